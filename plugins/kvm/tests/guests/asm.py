"""Freestanding x86 guests from readable assembler text, assembled when a test runs.

GNU ``as``, ``ld`` and ``nm`` (Debian: binutils) do the work; without them the test is skipped with
that reason. The text is AT&T syntax for one mode of the CPU and runs at :data:`ORIGIN`; these macros
are there in every mode::

    say $0x41       one byte to the debug port, on the host Pc.said
    through         tell the host that all is done (Pc.through), then sleep for ever
    pics_off        mask both 8259
    eoi             end of interrupt at the local APIC, eoi8259 at both 8259
    apic_on         the local APIC takes interrupts          (not in real mode)
    pin 5, 0x45     the IOAPIC's input 5 becomes vector 0x45; third argument: further bits of the entry
    gate 0x45, h    vector 0x45 goes to h                    (after idt, which loads the table)

    iret_32         return from an interrupt in 32-bit mode, where kvm_pvm has no IRET

All of them use eax and edx (rax, rdx) only, ``eoi`` none.
"""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

#: Where the text runs, and where its stack begins, growing downwards.
ORIGIN, STACK = 0x2000, 0x1000
#: What the host writes beside it: descriptors, long mode's tables.
GDT, TABLES = 0x500, 0x10000
#: Room for the guest's table of interrupts (in real mode it is at 0).
IDT = 0x1000
DEBUG_PORT, THROUGH_PORT = 0xE9, 0xF4
MODES = ("real16", "protected32", "long64")

_COMMON = """
        .macro  say byte
        movb    \\byte, %al
        outb    %al, $0xe9
        .endm
        .macro  through
        outb    %al, $0xf4
9991:   cli
        hlt
        jmp     9991b
        .endm
        .macro  pics_off
        movb    $0xff, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        .endm
        .macro  eoi8259
        push    %ax
        movb    $0x20, %al
        outb    %al, $0xa0
        outb    %al, $0x20
        pop     %ax
        .endm
"""
_FLAT = """
        .macro  apic_on
        movl    $0x10000, 0xfee00350
        movl    $0x1ff, 0xfee000f0
        .endm
        .macro  eoi
        movl    $0, 0xfee000b0
        .endm
        .macro  iret_32
        movl    8(%esp), %edx
        movl    (%esp), %eax
        movl    %eax, 8(%esp)
        movl    %edx, 4(%esp)
        addl    $4, %esp
        popfl
        ret
        .endm
        .macro  pin number, vector, flags=0
        movl    $(0x11 + 2 * \\number), 0xfec00000
        movl    $0, 0xfec00010
        movl    $(0x10 + 2 * \\number), 0xfec00000
        movl    $(\\vector | \\flags), 0xfec00010
        .endm
"""


def _gate_macros(size: int, pointer: str) -> str:
    """A table of 256 gates of ``size`` bytes; the upper half of a long one stays zero."""
    return f"""
        .macro  idt
        lidt    9992f
        jmp     9993f
9992:   .word   {256 * size - 1:#x}
        {pointer}   {IDT}
9993:
        .endm
        .macro  gate vector, handler
        movl    $\\handler, %eax
        movw    %ax, {IDT} + {size} * \\vector
        movw    $0x10, {IDT} + {size} * \\vector + 2
        movw    $0x8e00, {IDT} + {size} * \\vector + 4
        shrl    $16, %eax
        movw    %ax, {IDT} + {size} * \\vector + 6
        .endm
"""


_GATES = {
    "real16": """
        .macro  gate vector, handler
        movw    $\\handler, 4 * \\vector
        movw    $0, 4 * \\vector + 2
        .endm
""",
    "protected32": _gate_macros(8, ".long"),
    "long64": _gate_macros(16, ".quad"),
}
# An absolute address in 64-bit code above 2 GiB must not be sign extended, so it goes by a register.
_FLAT64 = """
        .macro  poke address, value
        movl    $\\address, %edx
        movl    $(\\value), (%rdx)
        .endm
        .macro  apic_on
        poke    0xfee00350, 0x10000
        poke    0xfee000f0, 0x1ff
        .endm
        .macro  eoi
        push    %rdx
        poke    0xfee000b0, 0
        pop     %rdx
        .endm
        .macro  pin number, vector, flags=0
        poke    0xfec00000, (0x11+2*\\number)
        poke    0xfec00010, 0
        poke    0xfec00000, (0x10+2*\\number)
        poke    0xfec00010, (\\vector|\\flags)
        .endm
"""
_PRELUDES = {
    "real16": "        .code16\n" + _COMMON + _GATES["real16"],
    "protected32": "        .code32\n" + _COMMON + _FLAT + _GATES["protected32"],
    "long64": "        .code64\n" + _COMMON + _FLAT64 + _GATES["long64"],
}
TOOLS = ("as", "ld", "nm")


@dataclass(frozen=True)
class Image:
    """Machine code that runs at its origin, and the addresses of its labels."""

    code: bytes
    labels: dict[str, int]


@functools.cache
def assemble(text: str, mode: str, origin: int = ORIGIN) -> Image:
    """Assemble and link, to run at ``origin``.

    Skips without the tools; AssertionError with their words for a wrong text.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install binutils")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "guest.s").write_text(f"{_PRELUDES[mode]}\n        .globl _start\n_start:\n{text}\n")
        _run(folder, "as", "--64", "-o", "guest.o", "guest.s")
        link = ("ld", "-Ttext", hex(origin), "-N")
        _run(folder, *link, "-o", "guest.elf", "guest.o")
        _run(folder, *link, "--oformat", "binary", "-o", "guest.bin", "guest.o")
        rows = [line.split() for line in _run(folder, "nm", "guest.elf").splitlines()]
        labels = {row[2]: int(row[0], 16) for row in rows if len(row) == 3}
        return Image((folder / "guest.bin").read_bytes(), labels)


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def boot_gdt(mode: str) -> bytes:
    """The four flat descriptors a loader leaves: nothing twice, code, data."""
    code = 0x00AF_9B00_0000_FFFF if mode == "long64" else 0x00CF_9B00_0000_FFFF
    return struct.pack("<4Q", 0, 0, code, 0x00CF_9300_0000_FFFF)
