"""What the parts of the contract of an engine share: a device that remembers, a guest, constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from qvmcore.bus import all_ones
from qvmcore.engine import Engine
from qvmcore.memory import MemoryRegion
from qvmcore.testing.access_server import AccessServer
from qvmcore.testing.guest_archs import GuestArch
from qvmcore.types import MemorySpec, MmioHandler, Window

#: Where the tests put a device, guest-physical, and where nothing is.
DEVICE, NOWHERE = 0x1C0D_0000, 0x2000_0000
#: I/O port of a device on architectures that have ports.
PORT = 0x2F8
#: Guest memory beside the program's.
RAM, ROM = 0x8000_0000, 0x8800_0000
PATTERN = 0x8877_6655_4433_2211


class Recorder:
    """A device that remembers its accesses, (offset, size, value or None), and reads as a pattern."""

    def __init__(self) -> None:
        self.log: list[tuple[int, int, int | None]] = []

    def read(self, offset: int, size: int) -> int:
        """Remember it."""
        self.log.append((offset, size, None))
        return PATTERN >> 8 * (offset % 8) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Remember it."""
        self.log.append((offset, size, value))

    @property
    def handler(self) -> MmioHandler:
        """What a window is bound to."""
        return MmioHandler(self.read, self.write)


class EngineKit:
    """The engine under test, and a guest of it."""

    engine: ClassVar[Engine]
    arch: ClassVar[GuestArch]
    widest: ClassVar[int] = 8

    @pytest.fixture(autouse=True)
    def _usable(self) -> None:
        reason = self.engine.unusable(self.arch.name)
        if reason:
            pytest.skip(f"engine {self.engine.name}: {reason}")

    @pytest.fixture
    def device(self) -> Recorder:
        """What answers at DEVICE, and at PORT where there are ports."""
        return Recorder()

    @pytest.fixture
    def made(self, device: Recorder) -> Iterator[AccessServer]:
        """A guest that was not started."""
        regions = [MemoryRegion(MemorySpec(RAM, 0x1_0000)), MemoryRegion(MemorySpec(ROM, 0x1_0000, rom=True))]
        server = AccessServer(self.engine, self.arch, regions=regions)
        server.bus.insert(DEVICE, Window(0x1000), device.handler, "recorder")
        if server.ports is not None:
            server.ports.insert(PORT, Window(8), device.handler, "recorder")
        yield server
        server.close()
        for region in regions:
            region.close()

    @pytest.fixture
    def server(self, made: AccessServer) -> AccessServer:
        """A guest that waits for orders."""
        return made.start()
