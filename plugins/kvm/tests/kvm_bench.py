"""A guest made of a listing, on the machine's own /dev/kvm, and the fixtures that make one."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from qvm_kvm.engine import KvmEngine

from qvmcore.api import (
    AddressSpace,
    Controller,
    CpuEntry,
    Doorbell,
    GuestConfig,
    GuestEnd,
    GuestMemory,
    MemorySpec,
    MmioHandler,
    MsiFrame,
    Window,
)

DATA = 0x8000
ROM = 0x200000
DEVICE = 0xC0000000
PORTS = 0xE0
#: The port a program writes to when it is done.
DONE = 0xE9
GDT = 0x500
PAGE_TABLES = 0x1000
CONTROLLERS = (
    Controller("ioapic", "ioapic", ((0xFEC00000, 0x1000),), range(1, 24)),
    Controller("apic", "apic", ((0xFEE00000, 0x100000),), range(32, 256)),
    Controller("i8259", "pic", (), range(0), ((0x20, 2), (0xA0, 2), (0x4D0, 2))),
    Controller("i8254", "pit", (), range(0), ((0x40, 4), (0x61, 1))),
)
MSI = MsiFrame("apic", "apic", 0xFEE00000, 0x100000, range(0))
#: Vectors 0x40, 0x41 (pin 5, edge), 0x42 (pin 6, level); each handler writes its vector to port 0xe0.
INTERRUPTED = """
10000 0f011d4a000000  lidt 0x4a(%rip) # 0x10051
10007 bbf000e0fe  mov $0xfee000f0,%ebx
1000c c703ff010000  movl $0x1ff,(%rbx)
10012 bb0000c0fe  mov $0xfec00000,%ebx
10017 c7031a000000  movl $0x1a,(%rbx)
1001d c7431041000000  movl $0x41,0x10(%rbx)
10024 c7031b000000  movl $0x1b,(%rbx)
1002a c7431000000000  movl $0x0,0x10(%rbx)
10031 c7031c000000  movl $0x1c,(%rbx)
10037 c7431042800000  movl $0x8042,0x10(%rbx)
1003e c7031d000000  movl $0x1d,(%rbx)
10044 c7431000000000  movl $0x0,0x10(%rbx)
1004b fb  sti
1004c e6e9  out %al,$0xe9
1004e f4  hlt
1004f ebfd  jmp 0x1004e
10051 ff0f0000020000000000  IDTR: limit 0xfff, base 0x20000
1005b 50  push %rax
1005c b040  mov $0x40,%al
1005e eb08  jmp 0x10068
10060 50  push %rax
10061 b041  mov $0x41,%al
10063 eb03  jmp 0x10068
10065 50  push %rax
10066 b042  mov $0x42,%al
10068 e6e0  out %al,$0xe0
1006a b8b000e0fe  mov $0xfee000b0,%eax
1006f c70000000000  movl $0x0,(%rax)
10075 58  pop %rax
10076 48cf  iretq
"""
HANDLERS = {0x40: 0x1005B, 0x41: 0x10060, 0x42: 0x10065}
IDT = 0x20000
APIC = 0xFEE00000


def assemble(listing: str) -> tuple[int, bytes]:
    """``address bytes  disassembly`` lines as (start, image)."""
    rows = [
        (int(line.split()[0], 16), bytes.fromhex(line.split()[1])) for line in listing.split("\n") if line
    ]
    start = rows[0][0]
    image = bytearray(rows[-1][0] + len(rows[-1][1]) - start)
    for address, code in rows:
        image[address - start : address - start + len(code)] = code
    return start, bytes(image)


@dataclass
class Bench:
    """16 MiB of RAM, a page of ROM at 2 MiB, a device page and some ports.

    ``accesses`` are (space, "r" or "w", offset, size, value or None) in order.
    """

    cpus: int = 1
    specs: tuple[MemorySpec, ...] = (
        MemorySpec(0, ROM),
        MemorySpec(ROM, 0x1000, rom=True),
        MemorySpec(ROM + 0x1000, 0xDFF000),
    )
    doorbells: tuple[tuple[Doorbell, int], ...] = ()
    port_doorbells: tuple[tuple[Doorbell, int], ...] = ()
    ends: list[GuestEnd] = field(default_factory=list)
    unsupported: list[tuple[int, int, int | None]] = field(default_factory=list)
    accesses: list[tuple[str, str, int, int, int | None]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.memory = GuestMemory.allocate(self.specs)
        self.bus = AddressSpace(lambda *access: self.unsupported.append(access))
        self.ports = AddressSpace(lambda *access: self.unsupported.append(access))
        self.read: Callable[[int, int], int] = lambda _offset, size: 0x8877665544332211 & (1 << 8 * size) - 1
        self.write: Callable[[int, int, int], None] = lambda _offset, _size, _value: None
        device = self._handler("mem", self.doorbells)
        self.bus.insert(DEVICE, Window(0x1000), device, "device")
        self.ports.insert(PORTS, Window(8), self._handler("io", ()), "ports")
        self.ports.insert(0x300, Window(8), self._handler("io300", self.port_doorbells), "bell")
        done = MmioHandler(lambda _o, _s: 0, lambda _o, _s, _v: self.done.set())
        self.ports.insert(DONE, Window(1), done, "done")
        self.bus.freeze()
        self.ports.freeze()
        try:
            self.guest: Any = KvmEngine().create_guest(self.config())
        except BaseException:
            self.memory.close()
            raise

    def config(self, **changes: Any) -> GuestConfig:
        """The guest's configuration."""
        values: dict[str, Any] = {
            "arch": "x86_64",
            "cpus": self.cpus,
            "memory": self.memory,
            "bus": self.bus,
            "controllers": CONTROLLERS,
            "on_end": self._on_end,
            "msi": MSI,
            "ports": self.ports,
        }
        return GuestConfig(**{**values, **changes})

    def _handler(self, space: str, doorbells: tuple[tuple[Doorbell, int], ...]) -> MmioHandler:
        def read(offset: int, size: int) -> int:
            self.accesses.append((space, "r", offset, size, None))
            return self.read(offset, size)

        def write(offset: int, size: int, value: int) -> None:
            self.accesses.append((space, "w", offset, size, value))
            self.write(offset, size, value)

        return MmioHandler(read, write, doorbells)

    def _on_end(self, end: GuestEnd) -> None:
        self.ends.append(end)
        self.ended.set()

    def load(self, listing: str) -> int:
        """Place a program; where it starts."""
        start, image = assemble(listing)
        self.memory.write(start, image)
        return start

    def start(self, listing: str, mode: str = "long64") -> None:
        """Run a program in ``mode``; it lies where its listing says."""
        pc = self.load(listing)
        flat_code = 0x00AF9B000000FFFF if mode == "long64" else 0x00CF9B000000FFFF
        self.memory.write(GDT, struct.pack("<4Q", 0, 0, flat_code, 0x00CF93000000FFFF))
        registers = {} if mode == "real16" else {"gdt": GDT, "rsp": 0x7000 + 0x800}
        if mode == "long64":
            self._page_tables()
            registers["cr3"] = PAGE_TABLES
        self.guest.start(CpuEntry(pc, registers, mode))

    def _page_tables(self) -> None:
        """4 GiB of 2 MiB pages, one to one."""
        directory = PAGE_TABLES + 0x1000
        self.memory.write(PAGE_TABLES, struct.pack("<Q", directory | 3))
        for gib in range(4):
            pages = directory + 0x1000 * (gib + 1)
            self.memory.write(directory + 8 * gib, struct.pack("<Q", pages | 3))
            self.memory.write(
                pages, struct.pack("<512Q", *((gib << 30 | i << 21 | 0x83) for i in range(512)))
            )

    def word(self, offset: int = 0) -> int:
        """64-bit word of the data page."""
        return int.from_bytes(self.memory.read(DATA + offset, 8), "little")

    def wait(self, condition: Callable[[], bool], timeout: float = 20.0) -> bool:
        """Whether ``condition`` came true; the bound is for a broken engine, not for speed."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def close(self) -> None:
        """Stop and free the guest; harmless when that is done."""
        assert self.guest.stop(10.0)
        self.guest.close()
        self.memory.close()


def put_handlers(bench: Any, handlers: dict[int, int]) -> None:
    """Fill the guest's IDT: vector -> address."""
    for vector, handler in handlers.items():
        gate = struct.pack("<HHBBHII", handler & 0xFFFF, 0x10, 0, 0x8E, handler >> 16, 0, 0)
        bench.memory.write(IDT + 16 * vector, gate)


def taken(bench: Any) -> Counter[int]:
    """How often each vector's handler ran."""
    return Counter(value for space, how, _, _, value in bench.accesses if (space, how) == ("io", "w"))


def one_by_one(bench: Any, vector: int, count: int, signal: Callable[[], None]) -> None:
    """Each signal is exactly one interrupt."""
    for number in range(1, count + 1):
        signal()
        assert bench.wait(lambda number=number: taken(bench)[vector] == number), f"lost number {number}"
    assert taken(bench)[vector] == count


def descriptors() -> set[str]:
    """What this process holds open, and as what."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {Path('/proc/self/fd', number).readlink()}")
        except OSError:
            continue  # the one the listing itself used
    return found


@pytest.fixture
def kvm() -> None:
    """A machine where KVM can be used."""
    reason = KvmEngine().unusable("x86_64")
    if reason:
        pytest.skip(reason)


@pytest.fixture
def make_bench(kvm: None) -> Iterator[Callable[..., Bench]]:
    """Benches that are stopped at the end of the test."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """A guest with one CPU."""
    return make_bench()


@pytest.fixture
def ready(bench: Any) -> Iterator[Any]:
    """A guest that waits for interrupts, with INTERRUPTED."""
    put_handlers(bench, HANDLERS)
    bench.start(INTERRUPTED)
    assert bench.done.wait(20)
    yield bench
    assert bench.ends == []
