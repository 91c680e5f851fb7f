"""What tests of an engine must know of an architecture: machine code, memory, interrupts.

The code is that of ``guest_programs/*.s``, assembled; a test of the core compares the two.
"""

from __future__ import annotations

import abc
import struct
from typing import TYPE_CHECKING, ClassVar

from qvmcore.engine import Controller, CpuEntry, MsiFrame
from qvmcore.memory import GuestMemory
from qvmcore.testing.access_server import MAILBOX, PROGRAM, STACK, WORDS
from qvmcore.types import IntrSpec, Reason

if TYPE_CHECKING:
    from qvmcore.testing.access_server import AccessServer

_BASE = PROGRAM.start


class GuestArch(abc.ABC):
    """One architecture, with the interrupt controllers of the board that belongs to it."""

    name: ClassVar[str]
    #: Lines of hexadecimal offset and code.
    listing: ClassVar[str]
    controllers: ClassVar[tuple[Controller, ...]]
    msi: ClassVar[MsiFrame]
    has_ports: ClassVar[bool] = False
    #: Registers every vCPU has, the program counter, and the one SPIN counts in.
    registers: ClassVar[frozenset[str]]
    pc: ClassVar[str]
    counting: ClassVar[str]
    #: An edge and a level interrupt, and one no controller has.
    edge: ClassVar[IntrSpec]
    level: ClassVar[IntrSpec]
    unknown: ClassVar[IntrSpec]
    #: Messages: what the guest sees of each is :meth:`number` of the same index; and foreign ones.
    messages: ClassVar[tuple[tuple[int, int], ...]]
    foreign: ClassVar[tuple[tuple[int, int], ...]]
    #: What the order END leads to.
    end_reason: ClassVar[Reason]

    @classmethod
    def code(cls) -> bytes:
        """The program, to run at PROGRAM.start."""
        image = bytearray()
        for line in cls.listing.split("\n"):
            if line.strip():
                offset, code = line.split()
                image += bytes(int(offset, 16) - len(image)) + bytes.fromhex(code)
        return bytes(image)

    def prepare_memory(self, memory: GuestMemory) -> None:
        """Write the program and what else it needs before the start."""
        memory.write(_BASE, self.code())

    @abc.abstractmethod
    def entry(self) -> CpuEntry:
        """Where the program starts."""

    @abc.abstractmethod
    def prepare(self, server: AccessServer) -> None:
        """Make the controllers ready for interrupts; the guest runs."""

    @abc.abstractmethod
    def enable(self, server: AccessServer, intr: IntrSpec, *, level: bool) -> int:
        """Let an interrupt through to the CPU; the number its handler counts."""

    @abc.abstractmethod
    def enable_message(self, server: AccessServer, index: int) -> int:
        """Let ``messages[index]`` through to the CPU; the number its handler counts."""


class Aarch64(GuestArch):
    """64-bit Arm with a GICv2 and a GICv2m frame, as on the board ``arm64-virt``."""

    name = "aarch64"
    listing = """
000 601640f91f000091c13f001001c018d5df3f03d5ff4203d5800240b921ffff10
020 2100008b620240f9630640f920001fd6630600f9f9ffff17
100 43004039cbffff17
120 43004079c3ffff17
140 430040b9bbffff17
160 430040f9b3ffff17
180 43000039abffff17
1a0 43000079a3ffff17
1c0 430000b99bffff17
1e0 430000f993ffff17
200 641240f984040091641200f9650e40f9a5ffffb487ffff17
220 df4203d5650e40f9850000b57f2003d5ff4203d5fbffff17ff4203d57dffff17
240 0080b0d200200091020000d400000014
a00 005238d5600a00f9601640f91f00009140b0ff10204018d5e0039fd6
a80 e007bfa9e20fbfa9a00e40b9012400123ff00f71c2000054620a018b430044b9
aa0 63040011430004b9a01200b9e20fc1a8e007c1a8e0039fd6
"""
    _DIST, _CPU, _FRAME = 0x0800_0000, 0x0801_0000, 0x0802_0000
    controllers = (Controller("gicv2", "gic", ((_DIST, 0x1_0000), (_CPU, 0x1_0000)), range(32, 288)),)
    msi = MsiFrame("gicv2m", "gic", _FRAME, 0x1000, range(112, 240))
    registers = frozenset({*(f"x{n}" for n in range(31)), "sp", "pc", "pstate"})
    pc, counting = "pc", "x4"
    edge, level, unknown = IntrSpec("gic", 41), IntrSpec("gic", 42), IntrSpec("gic", 1019)
    messages = ((_FRAME + 0x40, 120), (_FRAME + 0x40, 239))
    foreign = ((_FRAME + 0x40, 41), (_FRAME + 0x44, 120), (0x1234_0000, 120), (_FRAME + 0x40, 1 << 31))
    end_reason = Reason.GUEST_SHUTDOWN

    def entry(self) -> CpuEntry:
        """At EL1, MMU off."""
        return CpuEntry(_BASE, {"x19": WORDS, "x20": MAILBOX, "x21": self._CPU})

    def prepare(self, server: AccessServer) -> None:
        """Distributor and CPU interface on, nothing masked by priority."""
        server.store(self._DIST, 4, 1)
        server.store(self._CPU + 4, 4, 0xFF)
        server.store(self._CPU, 4, 1)

    def enable(self, server: AccessServer, intr: IntrSpec, *, level: bool) -> int:
        """Trigger, target CPU 0, enable."""
        number = intr.number
        place = self._DIST + 0xC00 + number // 16 * 4
        edge = 2 << number % 16 * 2
        old = server.load(place, 4) & ~edge
        server.store(place, 4, old if level else old | edge)
        server.store(self._DIST + 0x800 + number, 1, 1)
        server.store(self._DIST + 0x100 + number // 32 * 4, 4, 1 << number % 32)
        return number

    def enable_message(self, server: AccessServer, index: int) -> int:
        """The message is the number of a line."""
        return self.enable(server, IntrSpec("gic", self.messages[index][1]), level=False)


class X86_64(GuestArch):  # noqa: N801, the architecture is called so
    """64-bit x86 with IOAPIC and local APIC, as on the board ``x86_64-pc``."""

    name = "x86_64"
    listing = """
000 0f015f40fb8b06488d1df2ffffff4801c3488b17488b4f08ffe348894f08ebe5
020 50488b442408ff848700040000b8b000e0fec70000000000584883c40848cf58
040 0d0001000048894710488b6728fbebb5
100 0fb60ae912ffffff
120 0fb70ae9f2feffff
140 8b0ae9d3feffff
160 488b0ae9b2feffff
180 880ae993feffff
1a0 66890ae972feffff
1c0 890ae953feffff
1e0 48890ae932feffff
200 488b472048ffc04889472048837f180074f2e903feffff
220 fa48837f18007504fbf4ebf4fbe9e8fdffff
240 0f015f500f0b
260 ec0fb6c8e9b1fdffff
280 66ed0fb7c8e990fdffff
2a0 ed89c1e972fdffff
2c0 89c8eee952fdffff
2e0 89c866efe931fdffff
300 89c8efe912fdffff
"""
    _IOAPIC, _APIC = 0xFEC0_0000, 0xFEE0_0000
    _INTERRUPT, _EXCEPTION = 0x20, 0x3F  # the handlers in the listing
    _IDTR = 0x40  # in the block of words
    _STUBS, _IDT, _GDT, _TABLES = (_BASE + offset for offset in (0x4000, 0x5000, 0x6000, 0x9000))
    _FIRST_VECTOR = 0x70  # ioapic:N gets vector _FIRST_VECTOR + N
    controllers = (
        Controller("ioapic", "ioapic", ((_IOAPIC, 0x1000),), range(1, 24)),
        Controller("apic", "apic", ((_APIC, 0x10_0000),), range(32, 256)),
        Controller("i8259", "pic", (), range(0), ports=((0x20, 2), (0xA0, 2), (0x4D0, 2))),
        Controller("i8254", "pit", (), range(0), ports=((0x40, 4), (0x61, 1))),
    )
    msi = MsiFrame("apic", "apic", _APIC, 0x10_0000, range(0))
    has_ports = True
    registers = frozenset(
        {*(f"r{name}" for name in ("ax", "bx", "cx", "dx", "si", "di", "sp", "bp", "ip", "flags"))}
        | {*(f"r{n}" for n in range(8, 16)), "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base"}
        | {"cr0", "cr2", "cr3", "cr4", "efer"}
    )
    pc, counting = "rip", "rax"
    edge, level, unknown = IntrSpec("ioapic", 5), IntrSpec("ioapic", 20), IntrSpec("ioapic", 24)
    messages = ((_APIC, 0x50), (_APIC, 0xE1))
    foreign = ((0x1234_0000, 0x50), (0xFED0_0000, 0x50), (_APIC | 1 << 32, 0x50))
    end_reason = Reason.GUEST_CRASH

    def prepare_memory(self, memory: GuestMemory) -> None:
        """The program, a table of interrupts with a stub for each vector, and long mode's tables."""
        super().prepare_memory(memory)
        for vector in range(256):
            at = self._STUBS + 16 * vector
            handler = _BASE + (self._INTERRUPT if vector >= 32 else self._EXCEPTION)
            # push vector; jmp handler
            memory.write(at, struct.pack("<BIBi", 0x68, vector, 0xE9, handler - (at + 10)))
            gate = struct.pack("<HHBBHII", at & 0xFFFF, 0x10, 0, 0x8E, at >> 16 & 0xFFFF, at >> 32, 0)
            memory.write(self._IDT + 16 * vector, gate)
        memory.write(WORDS + self._IDTR, struct.pack("<HQ", 16 * 256 - 1, self._IDT))
        memory.write(self._GDT, struct.pack("<4Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
        write_identity_tables(memory, self._TABLES)

    def entry(self) -> CpuEntry:
        """In long mode."""
        registers = {
            "rdi": WORDS,
            "rsi": MAILBOX,
            "rsp": STACK,
            "rflags": 2,
            "gdt": self._GDT,
            "cr3": self._TABLES,
        }
        return CpuEntry(_BASE, registers, "long64")

    def prepare(self, server: AccessServer) -> None:
        """The two 8259 and LINT0 off, the local APIC on."""
        server.port_out(0x21, 1, 0xFF)
        server.port_out(0xA1, 1, 0xFF)
        server.store(self._APIC + 0x350, 4, 0x1_0000)
        server.store(self._APIC + 0xF0, 4, 0x1FF)

    def enable(self, server: AccessServer, intr: IntrSpec, *, level: bool) -> int:
        """An entry of the IOAPIC; the vectors of the local APIC are on already."""
        if intr.controller == "apic":
            return intr.number
        vector = self._FIRST_VECTOR + intr.number
        for register, value in ((0x11 + 2 * intr.number, 0), (0x10 + 2 * intr.number, vector | level << 15)):
            server.store(self._IOAPIC, 4, register)
            server.store(self._IOAPIC + 0x10, 4, value)
        return vector

    def enable_message(self, server: AccessServer, index: int) -> int:
        """The message names its vector."""
        return self.messages[index][1]


def write_identity_tables(memory: GuestMemory, at: int) -> None:
    """Page tables of x86 for the first 4 GiB, virtual = physical, in pages of 2 MiB: 0x6000 bytes."""
    memory.write(at, struct.pack("<Q", at + 0x1000 | 3))
    memory.write(at + 0x1000, struct.pack("<4Q", *(at + 0x2000 + 0x1000 * n | 3 for n in range(4))))
    memory.write(at + 0x2000, struct.pack("<2048Q", *(n << 21 | 0x83 for n in range(2048))))


ARCHS: dict[str, type[GuestArch]] = {"aarch64": Aarch64, "x86_64": X86_64}
