"""What a card is plugged into on the host: the one interface of peer, tap, user and none.

A message is a struct virtio_net_hdr of 12 bytes followed by an Ethernet frame, in both directions.
Everything runs on the card's worker thread, except where a method says otherwise, and never blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from qvmcore.api import Worker


class Sent(enum.Enum):
    """What became of a frame."""

    TAKEN = enum.auto()
    #: No room now; ``Events.writable`` follows.
    BUSY = enum.auto()
    #: Lost: nobody is at the other end.
    NO_LINK = enum.auto()
    #: Lost: the host refused this frame.
    REFUSED = enum.auto()


class Events(Protocol):
    """What a hostdev tells its card."""

    def readable(self, pair: int) -> None:
        """Frames wait for this queue pair."""

    def writable(self, pair: int) -> None:
        """There is room again after ``Sent.BUSY``."""

    def link_changed(self) -> None:
        """``HostDev.up`` is not what it was."""


class HostDev(Protocol):
    """The host side of a card. ``offloads`` are the feature bits (OFFLOADS) it can carry."""

    offloads: int

    @property
    def up(self) -> bool:
        """Whether a cable is plugged in. Any thread."""

    def open(self, worker: Worker, events: Events) -> None:
        """Take the host's resources. Main thread, before the start. Raises HostError."""

    def send(self, pair: int, message: Sequence[memoryview]) -> Sent:
        """Take a message, all or nothing."""

    def receive(self, pair: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """Scatter the next message over ``buffers``; its length, 0 when none waits.

        The buffers have room for more than a message may be long: one that fills them was too long,
        and its rest is lost.
        """

    def pause(self, pair: int, paused: bool) -> None:
        """Whether ``Events.readable`` stays away for now."""

    def set_guest_offloads(self, offloads: int) -> None:
        """Which unfinished frames the driver takes (GUEST_OFFLOADS). Any thread."""

    def set_pairs(self, pairs: int) -> bool:
        """Spread what is received over this many queue pairs; False when that cannot be. Any thread."""

    def close(self) -> None:
        """Give everything back. Idempotent; any thread, the worker has ended or never ran."""

    def status(self) -> Mapping[str, object]:
        """JSON-able state; any thread."""


class Interest:
    """One descriptor on the worker, watched exactly for what is wanted of it now."""

    def __init__(
        self, worker: Worker, fd: int, readable: Callable[[], None], writable: Callable[[], None]
    ) -> None:
        self._worker = worker
        self.fd = fd
        self._readable = readable
        self._writable = writable
        self._read = self._write = False

    def want(self, *, read: bool | None = None, write: bool | None = None) -> None:
        """Change what is wanted; None leaves it."""
        new = (self._read if read is None else read, self._write if write is None else write)
        if new == (self._read, self._write):
            return
        self._read, self._write = new
        if any(new):
            self._worker.watch(
                self.fd, self._readable if self._read else None, self._writable if self._write else None
            )
        else:
            # A hang-up would be reported for ever to a watch that wants nothing.
            self._worker.unwatch(self.fd)


class NoCable:
    """The hostdev of ``none = true``."""

    offloads = 0
    up = False

    def open(self, worker: Worker, events: Events) -> None:
        """Nothing to open."""

    def send(self, pair: int, message: Sequence[memoryview]) -> Sent:
        """Nobody is there."""
        return Sent.NO_LINK

    def receive(self, pair: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """Nothing comes."""
        return 0

    def pause(self, pair: int, paused: bool) -> None:
        """Nothing to pause."""

    def set_guest_offloads(self, offloads: int) -> None:
        """Nothing comes, in whatever state."""

    def set_pairs(self, pairs: int) -> bool:
        """There is one."""
        return pairs == 1

    def close(self) -> None:
        """Nothing to close."""

    def status(self) -> Mapping[str, object]:
        """What it is."""
        return {"hostdev": "none"}
