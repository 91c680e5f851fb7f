"""For the tests of the x86 loader: kernels made up of few bytes, and a machine to load them into."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qvmcore.acpi import AcpiTables
from qvmcore.engine import CpuEntry
from qvmcore.errors import QvmError
from qvmcore.load.x86 import load_pc
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec

MIB = 1 << 20
#: The root pointer and one table, where the board has them.
ACPI = AcpiTables(0xE0000, ((0xE0000, b"RSD PTR "), (0xE0040, b"XSDT" * 9)))
GDT_LONG = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
GDT_32 = struct.pack("<4Q", 0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
LONG = {"rflags": 2, "gdt": 0x500, "cr3": 0x9000, "rsi": 0x7000}
E820_64M = [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (0x100000, 63 * MIB, 1)]


def bzimage(
    body: bytes = b"\xf4" * 1024, *, sectors: int = 2, patch: dict[int, bytes] | None = None
) -> bytes:
    """A bzImage of boot protocol 2.15 with ``body``; ``patch`` replaces bytes at offsets of the file."""
    head = bytearray((sectors + 1) * 512)
    head[0x1F1] = sectors
    body += bytes(-len(body) % 16)
    fields = {
        0x1F4: struct.pack("<I", len(body) // 16),  # syssize
        0x1FE: b"\x55\xaa",
        0x200: b"\xeb\x6a",  # a jump, whose distance is the length of the header
        0x202: b"HdrS",
        0x206: struct.pack("<H", 0x20F),
        0x211: b"\x01",  # loadflags: LOADED_HIGH
        0x22C: struct.pack("<I", 0x7FFF_FFFF),  # initrd_addr_max
        0x230: struct.pack("<I", 2 * MIB),  # kernel_alignment
        0x234: b"\x01",  # relocatable_kernel
        0x236: struct.pack("<H", 0x0001),  # xloadflags: XLF_KERNEL_64
        0x238: struct.pack("<I", 2047),  # cmdline_size
        0x258: struct.pack("<Q", 16 * MIB),  # pref_address
        0x260: struct.pack("<I", 8 * MIB),  # init_size
    }
    for offset, data in {**fields, **(patch or {})}.items():
        head[offset : offset + len(data)] = data
    return bytes(head + body)


def elf64(
    *,
    address: int = MIB,
    entry: int | None = None,
    note: bytes = b"",
    machine: int = 62,
    body: bytes = b"\xf4" * 16,
) -> bytes:
    """A 64-bit ELF file of one segment, which takes 0x3000 bytes, and of the notes in ``note``."""
    entry = address + 4 if entry is None else entry
    ident = b"\x7fELF\x02\x01\x01"
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    at = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 5, at, 0xFFFF_FFFF_8000_0000, address, len(body), 0x3000, 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, at + len(body), 0, 0, len(note), len(note), 4)
    return header + load + notes + body + note


def elf32(*, address: int = MIB, machine: int = 3, note: bytes = b"", body: bytes = b"\xf4" * 16) -> bytes:
    """The same as a 32-bit file."""
    ident = b"\x7fELF\x01\x01\x01"
    header = struct.pack("<16sHHIIIIIHHHHHH", ident, 2, machine, 1, address + 8, 52, 0, 0, 52, 32, 2, 0, 0, 0)
    at = 52 + 2 * 32
    load = struct.pack("<IIIIIIII", 1, at, address, address, len(body), 0x3000, 5, 4096)
    notes = struct.pack("<IIIIIIII", 4, at + len(body), 0, 0, len(note), len(note), 4, 4)
    return header + load + notes + body + note


def elf_note(content: bytes, *, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    """One ELF note; by default what XEN_ELFNOTE_PHYS32_ENTRY is."""
    padded = content + bytes(-len(content) % 4)
    return struct.pack("<III", len(name), len(content), kind) + name + bytes(-len(name) % 4) + padded


class Loader:
    """Loads one file into a PC's memory."""

    def __init__(self, folder: Path, memory: GuestMemory) -> None:
        self.folder, self.memory = folder, memory
        self.acpi = ACPI

    def __call__(
        self,
        data: bytes,
        *,
        initrd: bytes | None = None,
        cmdline: str = "",
        kind: str = "auto",
        address: int | None = None,
        mode: str = "",
    ) -> CpuEntry:
        (self.folder / "kernel").write_bytes(data)
        ramdisk = None
        if initrd is not None:
            ramdisk = self.folder / "initrd"
            ramdisk.write_bytes(initrd)
        spec = LoadSpec(self.folder / "kernel", ramdisk, cmdline, kind, address, mode)
        return load_pc(spec, self.memory, self.acpi)

    def error(self, data: bytes, **arguments: object) -> str:
        with pytest.raises(QvmError) as caught:
            self(data, **arguments)  # type: ignore[arg-type]
        return str(caught.value).replace(str(self.folder), "DIR")

    def number(self, address: int, size: int) -> int:
        return int.from_bytes(self.memory.read(address, size), "little")

    def params(self, offset: int, size: int) -> int:
        """A field of boot_params."""
        return self.number(0x7000 + offset, size)

    def text(self, address: int) -> bytes:
        return self.memory.read(address, 4096).split(b"\0")[0]

    def e820(self) -> list[tuple[int, int, int]]:
        count = self.params(0x1E8, 1)
        return list(struct.iter_unpack("<QQI", self.memory.read(0x72D0, 20 * count)))
