"""For tests with a card: what a guest's driver does. Used by tests only."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from qvm_virtio_net import spec

if TYPE_CHECKING:
    from qvm_virtio_net.device import VirtioNet
    from qvmcore.testing.fakes import Plugged

MAC_A = bytes.fromhex("02000000000a")
MAC_B = bytes.fromhex("02000000000b")
#: Everything a driver could take of the ring, without features of the card.
PLAIN = 1 << 32


def ethernet(to: bytes = MAC_B, payload: bytes = b"hello", kind: int = 0x88B5) -> bytes:
    """A frame from MAC_A."""
    return to + MAC_A + struct.pack(">H", kind) + payload.ljust(46, b"\0")


def header(
    flags: int = 0, gso_type: int = 0, hdr_len: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0
) -> bytes:
    """struct virtio_net_hdr as a driver writes it."""
    return spec.HEADER.pack(flags, gso_type, hdr_len, gso_size, start, offset, 0)


class Guest:
    """A driver that has brought a card up; ``features`` are those to accept, all if None."""

    def __init__(self, device: Plugged[VirtioNet], features: int | None = None) -> None:
        self.device = device
        self.driver = device.driver()
        self.driver.start(features)
        self.rx, self.tx = self.driver.queues[:2]
        self.control = self.driver.queues[-1]
        self._partial: list[bytes] = []
        self._missing = 0

    @property
    def stats(self) -> Any:
        """The card's counters."""
        return self.device.vdev._stats

    @property
    def status(self) -> int:
        """The status field of the configuration."""
        return self.driver.config(6, 2)

    @property
    def link_up(self) -> bool:
        """Whether the cable is in."""
        return bool(self.status & spec.S_LINK_UP)

    def offer(self, *sizes: int) -> None:
        """Receive buffers."""
        for size in sizes:
            self.rx.add([], [size])
        self.rx.kick()
        self.device.settle()

    def send(self, frame: bytes, head: bytes = bytes(12)) -> Any:
        """Offer a frame; the request."""
        request = self.tx.submit([head, frame], [])
        self.device.settle()
        self.tx.reap()
        return request

    def received(self) -> list[tuple[bytes, bytes, list[int]]]:
        """(header, frame, bytes in each buffer) of each message that came since the last call."""
        self.device.settle()
        messages = []
        requests = self.rx.reap()
        while requests:
            first = requests[0]
            count = struct.unpack_from("<H", first.result(), 10)[0]
            assert 1 <= count <= len(requests), f"num_buffers {count} with {len(requests)} used buffers"
            used, requests = requests[:count], requests[count:]
            data = b"".join(request.result()[: request.length or 0] for request in used)
            messages.append((data[:12], data[12:], [request.length or 0 for request in used]))
        return messages

    def command(self, kind: int, which: int, data: bytes = b"") -> bool:
        """A control command; whether it was answered OK."""
        request = self.control.submit([bytes([kind, which]), data] if data else [bytes([kind, which])], [1])
        self.device.settle()
        assert self.control.reap() == [request], "the command was not answered"
        return bool(request.result() == spec.CTRL_OK)
