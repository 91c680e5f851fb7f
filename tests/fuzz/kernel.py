"""Targets for the kernel loaders: whatever a file holds, it is placed inside RAM or refused in a sentence."""

from __future__ import annotations

import gzip
import lzma
import struct
import tempfile
from functools import cache
from pathlib import Path

from qvmcore.acpi import AcpiTables
from qvmcore.errors import QvmError
from qvmcore.load.arm64 import load_arm64
from qvmcore.load.x86 import load_pc
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec, MemorySpec
from tests.fuzz.bytesource import ByteSource
from tests.unit.x86_files import bzimage, elf32, elf64, elf_note

RAM = MemorySpec(0x4000_0000, 8 << 20)
PC_RAM = MemorySpec(0, 32 << 20)
_ACPI = AcpiTables(0xE_0000, ((0xE_0000, b"RSD PTR "),))
_RAMDISK = b"ramdisk"


@cache
def _place(ram: MemorySpec) -> tuple[tempfile.TemporaryDirectory[str], Path, GuestMemory]:
    keep = tempfile.TemporaryDirectory(prefix="qvm-fuzz-")
    (Path(keep.name) / "initrd").write_bytes(_RAMDISK)
    return keep, Path(keep.name) / "kernel", GuestMemory.allocate([ram])


def kernel(data: bytes) -> None:
    """Image, gzip, EFI zboot and ELF, with any field and any payload; and bytes that are nothing."""
    source = ByteSource(data)
    make = source.pick((_plain, _image, _gzip, _zboot, _elf))
    form = source.pick(("auto", "auto", "linux", "elf", "raw"))
    address = source.value(8) if source.byte() & 1 else None
    content = make(source)
    _, path, memory = _place(RAM)
    path.write_bytes(content)
    spec = LoadSpec(path, format=form, address=address)
    try:
        entry = load_arm64(spec, memory, lambda placement: b"dtb")
    except QvmError as error:
        assert str(error)
    else:
        assert RAM.start <= entry.pc <= RAM.end
        assert memory.contains(entry.registers["x0"], 3)


def kernel_x86(data: bytes) -> None:
    """bzImage and ELF with any field, raw at any address in any mode; and bytes that are nothing."""
    source = ByteSource(data)
    make = source.pick((_plain, _bzimage, _elf_x86, _image, _zboot))
    form = source.pick(("auto", "auto", "linux", "elf", "raw"))
    mode = source.pick(("", "real16", "protected32", "long64")) if form == "raw" else ""
    flags = source.byte()
    address = source.value(8) if flags & 1 else None
    content = make(source)
    _, path, memory = _place(PC_RAM)
    path.write_bytes(content)
    initrd = path.with_name("initrd") if flags & 2 else None
    spec = LoadSpec(path, initrd, "quiet" if flags & 4 else "", form, address, mode)
    try:
        entry = load_pc(spec, memory, _ACPI)
    except QvmError as error:
        assert str(error)
        return
    assert memory.contains(entry.pc, 1)
    assert memory.read(0xE_0000, 8) == b"RSD PTR "
    if entry.mode == "real16":
        assert entry.pc < 0x1_0000
        return
    assert memory.read(entry.registers["gdt"], 16) == bytes(16)
    if entry.mode == "long64":
        params = memory.read(entry.registers["rsi"], 4096)
        where, size = struct.unpack_from("<I", params, 0x218)[0], struct.unpack_from("<I", params, 0x21C)[0]
        assert 0 < params[0x1E8] <= 128
    else:
        info = struct.unpack("<IIIIQQQQII", memory.read(entry.registers["rbx"], 56))
        where, size = struct.unpack("<QQ16x", memory.read(info[4], 32)) if info[3] else (0, 0)
    assert memory.read(where, size) == (_RAMDISK if initrd is not None else b"")


def _plain(source: ByteSource) -> bytes:
    return source.rest()


def _image(source: ByteSource) -> bytes:
    numbers = (source.value(8), source.value(8), source.value(8))
    header = struct.pack("<8xQQQ24s4sI", *numbers, b"", b"ARM\x64", 0)
    return header + source.rest()


def _good_image(source: ByteSource) -> bytes:
    """A small one that can be placed, with the rest of the input behind its header."""
    return struct.pack("<8xQQQ24s4sI", 0, 1 << 16, 0xA, b"", b"ARM\x64", 0) + source.rest()


def _gzip(source: ByteSource) -> bytes:
    cut, flip, at = source.byte(), source.byte(), source.uint(2)
    packed = bytearray(gzip.compress(_good_image(source), mtime=0))
    packed[at % len(packed)] ^= flip
    return bytes(packed[: len(packed) - (cut if cut < 32 else 0)])


def _zboot(source: ByteSource) -> bytes:
    method = source.pick((b"gzip", b"lzma", b"xzkern", b"zstd", b"", b"\xff" * 32))
    offset, size = (source.value(4), source.value(4)) if source.byte() & 1 else (64, -1)
    flip, at = source.byte(), source.uint(2)
    image = _good_image(source)
    packed = bytearray(
        lzma.compress(image, lzma.FORMAT_ALONE) if method == b"lzma"
        else lzma.compress(image) if method == b"xzkern"
        else gzip.compress(image, mtime=0)
    )  # fmt: skip
    packed[at % len(packed)] ^= flip
    size = len(packed) if size < 0 else size
    return struct.pack("<4s4sII8x32s8x", b"MZ", b"zimg", offset, size, method) + packed


def _elf(source: ByteSource) -> bytes:
    """A 64-bit AArch64 executable of one segment with some of its bytes changed."""
    phoff, entry = 64, RAM.start
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 183, 1, entry, phoff, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, RAM.start, RAM.start, 8, 8, 0)
    file = bytearray(header + segment + bytes(8))
    for _ in range(source.byte() % 8):
        at, size = source.byte() % len(file), source.pick((1, 2, 4, 8))
        file[at : at + size] = source.value(size).to_bytes(size, "little")
    return bytes(file + source.rest())


def _bzimage(source: ByteSource) -> bytes:
    """A kernel of 1 KiB with some of its header changed."""
    file = bytearray(bzimage(patch={0x258: struct.pack("<Q", 2 << 20)}))
    fields = (0x1F1, 0x1F4, 0x201, 0x206, 0x211, 0x22C, 0x230, 0x234, 0x236, 0x238, 0x258, 0x260)
    for _ in range(source.byte() % 8):
        at, size = source.pick(fields), source.pick((1, 2, 4, 8))
        file[at : at + size] = source.value(size).to_bytes(size, "little")
    cut = source.uint(2)
    return bytes(file[: cut if cut else len(file)] + source.rest())


def _elf_x86(source: ByteSource) -> bytes:
    """A 64-bit or 32-bit executable with a PVH note, some of its bytes changed."""
    note = elf_note(source.value(8).to_bytes(8, "little")) if source.byte() & 1 else b""
    file = bytearray(source.pick((elf64, elf32))(note=note))
    for _ in range(source.byte() % 8):
        at, size = source.byte() % len(file), source.pick((1, 2, 4, 8))
        file[at : at + size] = source.value(size).to_bytes(size, "little")
    return bytes(file + source.rest())
