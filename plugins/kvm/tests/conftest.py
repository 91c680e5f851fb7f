"""Fixtures: a PC without firmware on this machine's own /dev/kvm, driven by a few lines of assembler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from qvm_kvm.engine import KvmEngine

from plugins.kvm.tests.guests import asm
from plugins.kvm.tests.kvm_bench import bench, kvm, make_bench, ready  # noqa: F401
from qvmcore.api import AddressSpace, CpuEntry, Guest, GuestConfig, GuestEnd, GuestMemory, MmioHandler, Window
from qvmcore.bus import all_ones
from qvmcore.testing.guest_archs import X86_64, write_identity_tables
from qvmcore.types import MemorySpec

#: Devices of the test: in the hole every mode reaches, above RAM, and at a port.
LOW_DEVICE, HIGH_DEVICE, PORT = 0xA_0000, 0xC000_0000, 0x300
RAM = (MemorySpec(0, 0x8_0000), MemorySpec(0x10_0000, 0xF0_0000))
#: Words the guest and the test share.
SHARED = 0x6_0000
PATTERN = 0x8877_6655_4433_2211


class Pc:
    """A guest with 16 MiB of RAM, a device page at two places, and eight ports.

    Accesses of the devices are in ``log`` as (space, offset, size, value or None); they read as PATTERN.
    """

    def __init__(self, cpus: int = 1) -> None:
        self.log: list[tuple[str, int, int, int | None]] = []
        self.said = bytearray()
        self.through = threading.Event()
        self.ended = threading.Event()
        self.ends: list[GuestEnd] = []
        self.unsupported: list[tuple[int, int, int | None]] = []
        self.memory = GuestMemory.allocate(RAM)
        self.bus = AddressSpace(lambda *access: self.unsupported.append(access))
        self.ports = AddressSpace()
        for name, space, base, size in (
            ("low", self.bus, LOW_DEVICE, 0x1000),
            ("high", self.bus, HIGH_DEVICE, 0x1000),
            ("port", self.ports, PORT, 8),
        ):
            space.insert(base, Window(size), self.handler(name), name)
        say = MmioHandler(lambda _o, size: all_ones(size), lambda _o, _s, value: self.said.append(value))
        self.ports.insert(asm.DEBUG_PORT, Window(1), say, "debug")
        through = MmioHandler(lambda _o, size: all_ones(size), lambda _o, _s, _value: self.through.set())
        self.ports.insert(asm.THROUGH_PORT, Window(1), through, "through")
        self.guest: Guest = KvmEngine().create_guest(
            GuestConfig(
                "x86_64",
                cpus,
                self.memory,
                self.bus,
                X86_64.controllers,
                self._on_end,
                X86_64.msi,
                self.ports,
            )
        )

    def handler(self, name: str) -> MmioHandler:
        """A device that logs under ``name``."""

        def read(offset: int, size: int) -> int:
            self.log.append((name, offset, size, None))
            return PATTERN >> 8 * (offset % 8) & all_ones(size)

        return MmioHandler(read, lambda offset, size, value: self.log.append((name, offset, size, value)))

    def _on_end(self, end: GuestEnd) -> None:
        self.ends.append(end)
        self.ended.set()

    def start(self, text: str, mode: str = "long64", **registers: int) -> asm.Image:
        """Assemble the text, put it at its place and run it."""
        image = asm.assemble(text, mode)
        self.memory.write(asm.ORIGIN, image.code)
        values = {"rsp": asm.STACK, **registers}
        if mode != "real16":
            self.memory.write(asm.GDT, asm.boot_gdt(mode))
            values["gdt"] = asm.GDT
        if mode == "long64":
            write_identity_tables(self.memory, asm.TABLES)
            values["cr3"] = asm.TABLES
        self.guest.start(CpuEntry(asm.ORIGIN, values, mode))
        return image

    def run(self, text: str, mode: str = "long64", **registers: int) -> asm.Image:
        """Start it and wait until it says that it is through."""
        image = self.start(text, mode, **registers)
        assert self.through.wait(20), f"the guest is not through; ends {self.ends}, said {self.said.hex()}"
        return image

    def word(self, index: int = 0) -> int:
        """64-bit word ``index`` of the shared ones."""
        return int.from_bytes(self.memory.read(SHARED + 8 * index, 8), "little")

    def wait(self, condition: Callable[[], bool], timeout: float = 20.0) -> bool:
        """Whether ``condition`` came true; the bound is for a broken engine, not for speed."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0002)
        return True

    def wait_said(self, count: int) -> bool:
        """Wait until the guest has said that many bytes."""
        return self.wait(lambda: len(self.said) >= count)

    def wait_word(self, least: int, index: int = 0) -> bool:
        """Wait until a shared word is at least that."""
        return self.wait(lambda: self.word(index) >= least)

    @property
    def exits(self) -> Mapping[str, int]:
        """Exits by kind so far."""
        found: Any = self.guest.status()["exits"]
        return dict(found)

    def close(self) -> None:
        """Stop it and release everything."""
        assert self.guest.stop(10.0), "a vCPU did not stop"
        self.guest.close()
        self.memory.close()


def usable() -> str:
    """Why there is no KVM here; empty when there is."""
    return KvmEngine().unusable("x86_64")


NewPc = Callable[..., Pc]


@pytest.fixture
def new_pc() -> Iterator[NewPc]:
    """``new_pc(cpus=1)`` makes a PC that is stopped at the end of the test; skips without KVM."""
    reason = usable()
    if reason:
        pytest.skip(reason)
    made: list[Pc] = []

    def make(cpus: int = 1) -> Pc:
        made.append(Pc(cpus))
        return made[-1]

    yield make
    for pc in made:
        pc.close()


@pytest.fixture
def pc(new_pc: NewPc) -> Pc:
    """A PC with one CPU."""
    return new_pc()
