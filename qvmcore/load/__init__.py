"""Placing kernel, initrd and device tree into guest memory (floor 8).

Recognised by content: a Linux arm64 ``Image`` (Documentation/arch/arm64/booting.rst), the same in
a gzip file or in an EFI zboot image as distributions ship them, and ELF. ``format = "raw"`` puts
any file where ``address`` says and starts at its first byte.

Layout for an ``Image``: kernel at a 2 MiB boundary of RAM (plus its text offset), behind its BSS
one 2 MiB block for the device tree, behind that the initrd.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from qvmcore.boards import Board, Placement
from qvmcore.engine import CpuEntry
from qvmcore.errors import HostError, QvmError
from qvmcore.load.decompress import decompress
from qvmcore.memory import GuestMemory
from qvmcore.options import format_size
from qvmcore.types import LoadSpec

_MIB2 = 2 << 20
_PAGE = 4096
#: The booting protocol: a device tree blob is at most 2 MiB.
_DTB_MAX = _MIB2

_IMAGE_MAGIC = b"ARM\x64"
_IMAGE_HEADER = struct.Struct("<8xQQQ32x")  # text_offset, image_size, flags
_IMAGE_HEADER_SIZE = 64
#: text_offset of kernels before 3.17, which leave image_size 0.
_OLD_TEXT_OFFSET = 0x8_0000

_ZBOOT_HEADER = struct.Struct("<4s4sII8x32s")  # MZ, zimg, payload offset and size, compression
_GZIP_MAGIC = b"\x1f\x8b"
_ELF_MAGIC = b"\x7fELF"
_ELF_MACHINE = "EM_AARCH64"
_EXPECTED = "expected a Linux arm64 Image (plain, gzip or EFI zboot) or an ELF file"


class _Kernel(NamedTuple):
    """A kernel in guest memory: first address, first address behind it (BSS included), entry."""

    start: int
    end: int
    entry: int


def load_guest(
    spec: LoadSpec, memory: GuestMemory, board: Board, build_fdt: Callable[[Placement], bytes]
) -> CpuEntry:
    """Place everything ``spec`` names and say where the boot CPU starts.

    ``build_fdt`` is called once, when the place of the initrd is known. Raises HostError for a file
    that cannot be read, QvmError for one that is no kernel or does not fit.
    """
    if spec.kernel is None:
        raise QvmError("nothing to start: the VM file has no kernel", hint='write kernel = "Image" in [load]')
    kernel = _load_kernel(spec, spec.kernel, memory)
    dtb = _align_up(kernel.end, _MIB2)
    initrd = None
    if spec.initrd is not None:
        start = _align_up(dtb + _DTB_MAX, _PAGE)
        initrd = (start, start + _load_file(spec.initrd, memory, start, "initrd"))
    blob = build_fdt(Placement(kernel.start, kernel.entry, dtb, initrd))
    if len(blob) > _DTB_MAX:
        raise QvmError(f"the device tree has {len(blob)} bytes; a guest takes at most {_DTB_MAX}")
    if not memory.contains(dtb, len(blob)):
        raise _too_small("the device tree", len(blob), dtb, memory)
    memory.write(dtb, blob)
    # The arm64 booting protocol: x0 = device tree, x1 to x3 = 0.
    return CpuEntry(kernel.entry, {"x0": dtb, "x1": 0, "x2": 0, "x3": 0})


def _load_kernel(spec: LoadSpec, path: Path, memory: GuestMemory) -> _Kernel:
    head = _read_head(path)
    if spec.format == "raw":
        start = memory.regions[0].start if spec.address is None else spec.address
        return _Kernel(start, start + _load_file(path, memory, start, "kernel"), start)
    if head.startswith(_ELF_MAGIC) and spec.format in ("auto", "elf"):
        return _load_elf(path, memory)
    if spec.format == "elf":
        raise _not_a_kernel(path, head, "expected an ELF file")
    if _is_image(head):
        return _place_image(path, head, memory, lambda start: _load_file(path, memory, start, "kernel"))
    limit = max(region.size for region in memory.regions)
    if head.startswith(_GZIP_MAGIC):
        data = decompress("gzip", _read(path, limit), limit, path)
    elif head[:2] == b"MZ" and head[4:8] == b"zimg" and len(head) >= _ZBOOT_HEADER.size:
        data = _zboot_payload(path, head, limit)
    else:
        raise _not_a_kernel(path, head, _EXPECTED)
    if not _is_image(data):
        raise _not_a_kernel(path, data, "expected a Linux arm64 Image inside", "its content ")
    head = data[:_IMAGE_HEADER_SIZE]
    return _place_image(path, head, memory, lambda start: _store(path, memory, start, data))


def _is_image(head: Sequence[int] | bytes) -> bool:
    return len(head) >= _IMAGE_HEADER_SIZE and bytes(head[56:60]) == _IMAGE_MAGIC


def _place_image(path: Path, head: bytes, memory: GuestMemory, store: Callable[[int], int]) -> _Kernel:
    text_offset, image_size, flags = _IMAGE_HEADER.unpack_from(head)
    if flags & 1:
        raise QvmError(f"{path}: a big-endian kernel; only little-endian guests can be started")
    if image_size == 0:
        text_offset = _OLD_TEXT_OFFSET
    if text_offset >= _MIB2:
        raise QvmError(f"{path}: damaged kernel header: text offset {text_offset:#x} is not below 2 MiB")
    start = _align_up(memory.regions[0].start, _MIB2) + text_offset
    if not memory.contains(start, image_size):
        raise _too_small(f"{path}: the kernel with its work space", image_size, start, memory)
    size = store(start)
    return _Kernel(start, start + max(size, image_size), start)


def _zboot_payload(path: Path, head: bytes, limit: int) -> bytes:
    _, _, offset, size, name = _ZBOOT_HEADER.unpack_from(head)
    method = name.split(b"\0")[0].decode("ascii", "replace")
    image = _read(path, limit)
    if offset < _ZBOOT_HEADER.size or offset + size > len(image):
        raise QvmError(
            f"{path}: damaged EFI zboot header: payload [{offset:#x}, +{size:#x}) is not inside the file",
            hint="the file may be cut short; get it again",
        )
    return decompress(method, image[offset : offset + size], limit, path)


class _Segment(NamedTuple):
    """A PT_LOAD segment: place and size in memory, offset and size in the file."""

    address: int
    size: int
    offset: int
    stored: int


def _load_elf(path: Path, memory: GuestMemory) -> _Kernel:
    file_size = path.stat().st_size
    entry, segments = _parse_elf(path)
    if not segments:
        raise QvmError(f"{path}: the ELF file has nothing to load (no PT_LOAD segment)")
    with _open(path) as file:
        for segment in segments:
            address, size = segment.address, max(segment.size, segment.stored)
            if not memory.contains(address, size):
                message = f"{path}: the ELF segment [{address:#x}, +{size:#x}) is not in RAM"
                raise QvmError(message, hint=_ram_hint(memory))
            if segment.offset + segment.stored > file_size:
                raise QvmError(f"{path}: damaged ELF file: a segment ends behind the end of the file")
            _fill(path, file.fileno(), segment.offset, memory.view(address, segment.stored))
    start, end = min(s.address for s in segments), max(s.address + s.size for s in segments)
    if not memory.contains(entry, 4):
        raise QvmError(f"{path}: the entry point {entry:#x} of the ELF file is not in RAM")
    return _Kernel(start, end, entry)


def _parse_elf(path: Path) -> tuple[int, list[_Segment]]:
    """Entry point and segments that take memory."""
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise QvmError(f"{path}: ELF kernels need pyelftools", hint="pip install 'qvmcore[elf]'") from None
    with path.open("rb") as file:
        try:
            elf = ELFFile(file)
            entry, machine = int(elf.header.e_entry), elf.header.e_machine
            headers = [s.header for s in elf.iter_segments(type="PT_LOAD")] if machine == _ELF_MACHINE else []
            segments = [
                _Segment(int(h.p_paddr), int(h.p_memsz), int(h.p_offset), int(h.p_filesz)) for h in headers
            ]
        except Exception as error:
            # pyelftools trusts what it reads: damaged headers end in OSError, KeyError, TypeError ...
            raise QvmError(f"{path}: damaged ELF file: {error}") from error
    if machine != _ELF_MACHINE:
        raise QvmError(f"{path}: an ELF file for {machine}, not for AArch64")
    return entry, [segment for segment in segments if segment.size]


def _load_file(path: Path, memory: GuestMemory, start: int, what: str) -> int:
    """Read the whole file to ``start`` without a copy; its size in bytes."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not memory.contains(start, size):
            raise _too_small(f"{path}: the {what}", size, start, memory)
        _fill(path, file.fileno(), 0, memory.view(start, size))
    return size


def _store(path: Path, memory: GuestMemory, start: int, data: bytes) -> int:
    if not memory.contains(start, len(data)):
        raise _too_small(f"{path}: the kernel", len(data), start, memory)
    memory.write(start, data)
    return len(data)


def _fill(path: Path, fd: int, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise HostError.from_os("read", path, error) from error
        if count == 0:
            raise HostError(f"cannot read {path}: the file ends after {offset + done} bytes")
        done += count


def _open(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise HostError.from_os("read", path, error) from error


def _read_head(path: Path) -> bytes:
    with _open(path) as file:
        return bytes(file.read(_IMAGE_HEADER_SIZE))


def _read(path: Path, limit: int) -> bytes:
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise QvmError(f"{path}: the file ({format_size(size)}) is larger than the guest's RAM")
        return bytes(file.readall())


def _not_a_kernel(path: Path, data: bytes, expected: str, what: str = "") -> QvmError:
    first = data[:8].hex(" ") if data else "none, the file is empty"
    return QvmError(f"{path}: {what}is not a kernel: first bytes {first}; {expected}")


def _too_small(what: str, size: int, start: int, memory: GuestMemory) -> QvmError:
    message = f"{what} ({format_size(size)} at {start:#x}) does not fit into RAM"
    return QvmError(message, hint=_ram_hint(memory))


def _ram_hint(memory: GuestMemory) -> str:
    regions = ", ".join(f"[{r.start:#x}, {r.end:#x})" for r in memory.regions)
    return f"RAM is {regions}; give the guest more"


def _align_up(value: int, step: int) -> int:
    return (value + step - 1) // step * step
