"""What a card counts. Written by the worker, read by any thread."""

from __future__ import annotations


class Stats:
    """Frames and bytes that passed, and those that did not, by reason.

    ``rx_no_buffer``: the guest had no room; ``rx_filtered``: not for this card; ``rx_malformed``: too
    long, too short or with a header that is wrong; ``rx_no_driver``: no driver was up, or not on this
    pair. ``rx_finished``: the driver could not take it as it was, or must not be told of its checksum.
    ``tx_stalled``: the host side took nothing for too long; ``tx_no_link``: no cable;
    ``tx_malformed``: too long or too short. Bytes are those of the Ethernet frame.
    """

    __slots__ = (
        "rx_bytes", "rx_filtered", "rx_finished", "rx_frames", "rx_malformed", "rx_no_buffer", "rx_no_driver",
        "tx_bytes", "tx_frames", "tx_malformed", "tx_no_link", "tx_stalled",
    )  # fmt: skip

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    rx_bytes: int
    rx_filtered: int
    rx_finished: int
    rx_frames: int
    rx_malformed: int
    rx_no_buffer: int
    rx_no_driver: int
    tx_bytes: int
    tx_frames: int
    tx_malformed: int
    tx_no_link: int
    tx_stalled: int

    def report(self) -> dict[str, object]:
        """The counters as JSON-able values."""
        return {name: getattr(self, name) for name in self.__slots__}
