"""For tests with a disk: the requests of a guest's driver. Used by tests only."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qvm_virtio_blk.device import VirtioBlk

if TYPE_CHECKING:
    from qvmcore.testing.driver import MmioDriver, Request
    from qvmcore.testing.fakes import Plugged

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2


def header(kind: int, sector: int = 0) -> bytes:
    """struct virtio_blk_req up to the data."""
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """struct virtio_blk_discard_write_zeroes; flag 1 is unmap."""
    return struct.pack("<QII", sector, sectors, flags)


class Guest:
    """A driver that has brought the disk up; ``features`` are those to accept, all if None."""

    def __init__(self, device: Plugged[VirtioBlk], driver: MmioDriver, features: int | None = None) -> None:
        self.device = device
        self.driver = driver
        driver.start(features)

    def submit(self, readable: Sequence[bytes], writable: Sequence[int]) -> Request:
        """A chain of exactly these descriptors, served or refused when this returns."""
        request = self.driver.queues[0].submit(readable, writable)
        self.device.settle()
        self.driver.queues[0].reap()
        return request

    def io(self, readable: Sequence[bytes], writable: Sequence[int]) -> tuple[int, bytes]:
        """(status, the data before it) of a chain that must be answered."""
        request = self.submit(readable, writable)
        assert request.done, "the request was not answered"
        assert not self.driver.needs_reset
        result = request.result()
        status, data = result[-1], result[:-1]
        # Used length (2.7.8.2): bytes written from the first one on, so all or nothing.
        filled = status == OK and readable and readable[0][:1] in (bytes([IN]), bytes([GET_ID]))
        assert request.length == (len(result) if filled or not data else 0)
        return status, data

    def read(self, sector: int, length: int = 512) -> tuple[int, bytes]:
        """T_IN in three descriptors."""
        return self.io([header(IN, sector)], [length, 1] if length else [1])

    def write(self, sector: int, data: bytes) -> int:
        """T_OUT in three descriptors."""
        return self.io([header(OUT, sector), data], [1])[0]

    def ranges(self, kind: int, *segments: bytes) -> int:
        """DISCARD or WRITE_ZEROES of these segments in one descriptor."""
        return self.io([header(kind), b"".join(segments)], [1])[0]

    def alive(self) -> bool:
        """Whether the disk serves a good request, and its plugin never failed, also not after it."""
        served = self.read(0)[0] == OK
        self.device.settle()
        return served and not self.device.ctx.faults


#: ``start(device, features=None)``: a guest on a plugged disk.
Start = Callable[..., Guest]
