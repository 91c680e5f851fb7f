"""Target for the kernel loader: whatever a file holds, it is placed inside RAM or refused in a sentence."""

from __future__ import annotations

import gzip
import lzma
import struct
import tempfile
from functools import cache
from pathlib import Path

from qvmcore import boards
from qvmcore.errors import QvmError
from qvmcore.load import load_guest
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec, MemorySpec
from tests.fuzz.bytesource import ByteSource

RAM = MemorySpec(0x4000_0000, 8 << 20)


@cache
def _place() -> tuple[tempfile.TemporaryDirectory[str], Path, GuestMemory]:
    keep = tempfile.TemporaryDirectory(prefix="qvm-fuzz-")
    return keep, Path(keep.name) / "kernel", GuestMemory.allocate([RAM])


def kernel(data: bytes) -> None:
    """Image, gzip, EFI zboot and ELF, with any field and any payload; and bytes that are nothing."""
    source = ByteSource(data)
    make = source.pick((_plain, _image, _gzip, _zboot, _elf))
    form = source.pick(("auto", "auto", "linux", "elf", "raw"))
    address = source.value(8) if source.byte() & 1 else None
    content = make(source)
    _, path, memory = _place()
    path.write_bytes(content)
    spec = LoadSpec(path, format=form, address=address)
    try:
        entry = load_guest(spec, memory, boards.get("arm64-virt"), lambda placement: b"dtb")
    except QvmError as error:
        assert str(error)
    else:
        assert RAM.start <= entry.pc <= RAM.end
        assert memory.contains(entry.registers["x0"], 3)


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
