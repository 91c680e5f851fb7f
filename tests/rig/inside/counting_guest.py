"""A guest on KVM that does nothing but take interrupts; the test is the driver of the device they are of.

Vector 0x40 is for messages, 0x42 is pin 6 as a level. The guest's handler writes its vector to a port and
ends the interrupt then; the port's handler here is where the driver's part of an interrupt belongs.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

from qvm_kvm.engine import KvmEngine

from qvmcore.api import (
    AddressSpace,
    CpuEntry,
    Guest,
    GuestConfig,
    GuestEnd,
    GuestMemory,
    IntrSpec,
    MemorySpec,
    MmioHandler,
    Window,
)
from qvmcore.pci.sources import Stop
from qvmcore.testing.fake_listening import FakeListening
from qvmcore.testing.guest_archs import X86_64, write_identity_tables

MESSAGE, LEVEL = 0x40, 0x42
#: Pin 6, which the program has unmasked.
LINE = IntrSpec("ioapic", 6)
_START, _IDT, _GDT, _TABLES, _STACK = 0x10000, 0x20000, 0x500, 0x1000, 0x7800
_READY, _VECTOR = 0xE9, 0xE0
_IDTR, _CODE = 0x37, 0x48
_HANDLERS = {MESSAGE: _START + _CODE, LEVEL: _START + _CODE + 5}
_PROGRAM = """
0f011d30000000  lidt 0x30(%rip) # 0x37
bbf000e0fe      mov $0xfee000f0,%ebx
c703ff010000    movl $0x1ff,(%rbx)
bb0000c0fe      mov $0xfec00000,%ebx
c7031c000000    movl $0x1c,(%rbx)       # pin 6: level, vector 0x42
c7431042800000  movl $0x8042,0x10(%rbx)
c7031d000000    movl $0x1d,(%rbx)
c7431000000000  movl $0x0,0x10(%rbx)
"""
_WAIT = """
fb              sti
e6e9            out %al,$0xe9
f4              hlt
ebfd            jmp -1
"""
_HANDLER = """
50              push %rax
b040            mov $0x40,%al
eb03            jmp to the out
50              push %rax
b042            mov $0x42,%al
e6e0            out %al,$0xe0
b8b000e0fe      mov $0xfee000b0,%eax
c70000000000    movl $0x0,(%rax)
58              pop %rax
48cf            iretq
"""


class Straight(FakeListening):
    """The place of :class:`FakeListening` on a bus of the tests: a real guest on KVM listens."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        self._guest = guest

    def listen(self, fd: int, address: int, data: int) -> Stop | None:
        """By KVM."""
        return self._guest.listen(fd, address, data)

    def listen_level(self, fd: int, resample: int) -> Stop | None:
        """By KVM, on pin 6."""
        return self._guest.listen_level(LINE, fd, resample)


class CountingGuest:
    """``taken`` are the interrupts by vector. ``served(vector)`` is called before each is ended."""

    def __init__(self) -> None:
        self.taken: Counter[int] = Counter()
        self.ends: list[GuestEnd] = []
        self.served: Callable[[int], None] = lambda vector: None
        self._ready = threading.Event()
        self._memory = GuestMemory.allocate((MemorySpec(0, 1 << 20),))
        bus, ports = AddressSpace(), AddressSpace()
        for port, write in ((_READY, lambda _o, _s, _v: self._ready.set()), (_VECTOR, self._vector)):
            ports.insert(port, Window(1), MmioHandler(lambda _o, _s: 0, write), "test")
        for space in (bus, ports):
            space.freeze()
        config = GuestConfig(
            "x86_64", 1, self._memory, bus, X86_64.controllers, self.ends.append, X86_64.msi, ports
        )
        self.guest: Guest = KvmEngine().create_guest(config)

    def _vector(self, _offset: int, _size: int, vector: int) -> None:
        self.served(vector)
        self.taken[vector] += 1

    def start(self) -> None:
        """Return when it is ready for interrupts."""
        memory = self._memory
        image = bytearray(_CODE)
        idtr = struct.pack("<HQ", 0xFFF, _IDT)
        program = _bytes(_PROGRAM) + _bytes(_WAIT) + idtr
        image[: len(program)] = program
        memory.write(_START, bytes(image) + _bytes(_HANDLER))
        for vector, at in _HANDLERS.items():
            memory.write(
                _IDT + 16 * vector, struct.pack("<HHBBHII", at & 0xFFFF, 0x10, 0, 0x8E, at >> 16, 0, 0)
            )
        memory.write(_GDT, struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF))
        write_identity_tables(memory, _TABLES)
        registers = {"gdt": _GDT, "cr3": _TABLES, "rsp": _STACK}
        self.guest.start(CpuEntry(_START, registers, "long64"))
        assert self._ready.wait(60), f"not ready; ends {self.ends}"

    def wait(self, vector: int, count: int) -> bool:
        """Whether that many have come, after at most 30 seconds."""
        deadline = time.monotonic() + 30
        while self.taken[vector] < count and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.taken[vector] >= count

    def close(self) -> None:
        """Stop it and give everything back."""
        assert self.guest.stop(30.0)
        self.guest.close()
        self._memory.close()
        assert not self.ends


def _bytes(listing: str) -> bytes:
    return b"".join(bytes.fromhex(line.split()[0]) for line in listing.strip().splitlines())
