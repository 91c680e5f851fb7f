"""Fixtures: a guest made of a listing, in both modes."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from qvm_emulator.cpu import Cpu
from qvm_emulator.fast import FastCpu
from qvm_emulator.guest import EmulatedGuest
from qvm_emulator.safe import SafeCpu
from qvm_emulator.trial import GIC

from qvmcore.api import AddressSpace, CpuEntry, GuestConfig, GuestEnd, GuestMemory, MmioHandler, Window
from qvmcore.types import MemorySpec

RAM = 0x4000_0000
RESULT = RAM + 0x8000
ROM = 0x1000_0000
DEVICE = 0x0900_0000


def assemble(listing: str) -> bytes:
    """``offset word  disassembly`` lines as an image."""
    rows = [line.split(None, 2) for line in listing.splitlines() if line]
    image = bytearray(max(int(row[0], 16) for row in rows) + 4)
    for row in rows:
        struct.pack_into("<I", image, int(row[0], 16), int(row[1], 16))
    return bytes(image)


@dataclass
class Bench:
    """A guest with 64 KiB of RAM, 64 KiB of ROM and one device page."""

    cpu_class: type[Cpu]
    ends: list[GuestEnd] = field(default_factory=list)
    unsupported: list[tuple[int, int, int | None]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.memory = GuestMemory.allocate([MemorySpec(RAM, 0x1_0000), MemorySpec(ROM, 0x1_0000, rom=True)])
        self.bus = AddressSpace(lambda *access: self.unsupported.append(access))
        self.read: Callable[[int, int], int] = lambda _offset, _size: 0
        self.bus.insert(
            DEVICE,
            Window(0x1000),
            MmioHandler(lambda offset, size: self.read(offset, size), lambda _offset, _size, _value: None),
            "bench",
        )
        self.bus.freeze()
        self.guest = EmulatedGuest(
            GuestConfig("aarch64", 1, self.memory, self.bus, (GIC,), self._on_end), self.cpu_class
        )

    def _on_end(self, end: GuestEnd) -> None:
        self.ends.append(end)
        self.ended.set()

    def start(self, listing: str) -> None:
        """Place the program at the start of RAM and run it with x0 = the result block."""
        self.memory.write(RAM, assemble(listing))
        self.guest.start(CpuEntry(RAM, {"x0": RESULT}))

    def word(self, index: int) -> int:
        """64-bit word ``index`` of the result block."""
        return int.from_bytes(self.memory.read(RESULT + 8 * index, 8), "little")

    def wait(self, condition: Callable[[], bool], timeout: float = 20.0) -> bool:
        """Whether ``condition`` came true; the bound is for a broken engine, not for speed."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def close(self) -> None:
        assert self.guest.stop(5.0)
        self.guest.close()
        self.memory.close()


@pytest.fixture(params=[FastCpu, SafeCpu], ids=["fast", "safe"])
def cpu_class(request: pytest.FixtureRequest) -> type[Cpu]:
    """Both modes."""
    found: type[Cpu] = request.param
    return found


@pytest.fixture
def bench(cpu_class: type[Cpu]) -> Iterator[Bench]:
    """A guest that is stopped at the end of the test."""
    made = Bench(cpu_class)
    yield made
    made.close()
