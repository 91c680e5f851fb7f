"""Starting an arm64 guest (floor 8): kernel, device tree and initrd in guest memory.

Recognised by content: a Linux arm64 ``Image`` (Documentation/arch/arm64/booting.rst), the same in
a gzip file or in an EFI zboot image as distributions ship them, and ELF. ``format = "raw"`` puts
any file where ``address`` says and starts at its first byte.

Layout for an ``Image``: kernel at a 2 MiB boundary of RAM (plus its text offset), behind its BSS
one 2 MiB block for the device tree, behind that the initrd.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qvmcore.boards import Placement
from qvmcore.engine import CpuEntry
from qvmcore.errors import QvmError
from qvmcore.load.common import align_up, load_file, read_all, read_head, store, too_small
from qvmcore.load.decompress import decompress
from qvmcore.load.elf import place_elf, read_elf
from qvmcore.load.kinds import (
    ELF_MAGIC,
    GZIP_MAGIC,
    is_arm64_image,
    is_zboot,
    not_a_kernel,
    refuse_foreign,
)
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec

_BOARD = "arm64-virt"
_MIB2 = 2 << 20
_PAGE = 4096
#: The booting protocol: a device tree blob is at most 2 MiB.
_DTB_MAX = _MIB2

_IMAGE_HEADER = struct.Struct("<8xQQQ32x")  # text_offset, image_size, flags
#: text_offset of kernels before 3.17, which leave image_size 0.
_OLD_TEXT_OFFSET = 0x8_0000

_ZBOOT_HEADER = struct.Struct("<4s4sII8x32s")  # MZ, zimg, payload offset and size, compression
_MACHINES = {"EM_AARCH64": "AArch64"}
_EXPECTED = "expected a Linux arm64 Image (plain, gzip or EFI zboot) or an ELF file"


class _Kernel(NamedTuple):
    """A kernel in guest memory: first address, first address behind it (BSS included), entry."""

    start: int
    end: int
    entry: int


def load_arm64(spec: LoadSpec, memory: GuestMemory, build_fdt: Callable[[Placement], bytes]) -> CpuEntry:
    """Place everything ``spec`` names and say where the boot CPU starts.

    ``build_fdt`` is called once, when the place of the initrd is known. Raises HostError for a file
    that cannot be read, QvmError for one that is no kernel or does not fit.
    """
    if spec.kernel is None:
        raise QvmError("nothing to start: the VM file has no kernel", hint='write kernel = "Image" in [load]')
    if spec.mode:
        raise QvmError(f"mode = {spec.mode!r} is for x86 CPUs, and {_BOARD} has none", hint="remove mode")
    kernel = _load_kernel(spec, spec.kernel, memory)
    dtb = align_up(kernel.end, _MIB2)
    initrd = None
    if spec.initrd is not None:
        start = align_up(dtb + _DTB_MAX, _PAGE)
        initrd = (start, start + load_file(spec.initrd, memory, start, "initrd"))
    blob = build_fdt(Placement(kernel.start, kernel.entry, dtb, initrd))
    if len(blob) > _DTB_MAX:
        raise QvmError(f"the device tree has {len(blob)} bytes; a guest takes at most {_DTB_MAX}")
    if not memory.contains(dtb, len(blob)):
        raise too_small("the device tree", len(blob), dtb, memory)
    memory.write(dtb, blob)
    # The arm64 booting protocol: x0 = device tree, x1 to x3 = 0.
    return CpuEntry(kernel.entry, {"x0": dtb, "x1": 0, "x2": 0, "x3": 0})


def _load_kernel(spec: LoadSpec, path: Path, memory: GuestMemory) -> _Kernel:
    head = read_head(path)
    if spec.format == "raw":
        start = memory.regions[0].start if spec.address is None else spec.address
        return _Kernel(start, start + load_file(path, memory, start, "kernel"), start)
    if head.startswith(ELF_MAGIC) and spec.format in ("auto", "elf"):
        return _load_elf(path, memory)
    refuse_foreign(path, head, _BOARD)
    if spec.format == "elf":
        raise not_a_kernel(path, head, "expected an ELF file")
    if is_arm64_image(head):
        return _place_image(path, head, memory, lambda start: load_file(path, memory, start, "kernel"))
    limit = max(region.size for region in memory.regions)
    if head.startswith(GZIP_MAGIC):
        data = decompress("gzip", read_all(path, limit), limit, path)
    elif is_zboot(head):
        data = _zboot_payload(path, head, limit)
    else:
        raise not_a_kernel(path, head, _EXPECTED)
    refuse_foreign(path, data, _BOARD)
    if not is_arm64_image(data):
        raise not_a_kernel(path, data, "expected a Linux arm64 Image inside", "its content ")
    return _place_image(path, data, memory, lambda start: store(path, memory, start, data))


def _load_elf(path: Path, memory: GuestMemory) -> _Kernel:
    elf = read_elf(path, _MACHINES, _BOARD)
    place_elf(elf, memory)
    start, end = min(s.address for s in elf.segments), max(s.end for s in elf.segments)
    return _Kernel(start, end, elf.entry)


def _place_image(path: Path, head: bytes, memory: GuestMemory, put: Callable[[int], int]) -> _Kernel:
    text_offset, image_size, flags = _IMAGE_HEADER.unpack_from(head)
    if flags & 1:
        raise QvmError(f"{path}: a big-endian kernel; only little-endian guests can be started")
    if image_size == 0:
        text_offset = _OLD_TEXT_OFFSET
    if text_offset >= _MIB2:
        raise QvmError(f"{path}: damaged kernel header: text offset {text_offset:#x} is not below 2 MiB")
    start = align_up(memory.regions[0].start, _MIB2) + text_offset
    if not memory.contains(start, image_size):
        raise too_small(f"{path}: the kernel with its work space", image_size, start, memory)
    size = put(start)
    return _Kernel(start, start + max(size, image_size), start)


def _zboot_payload(path: Path, head: bytes, limit: int) -> bytes:
    _, _, offset, size, name = _ZBOOT_HEADER.unpack_from(head)
    method = name.split(b"\0")[0].decode("ascii", "replace")
    image = read_all(path, limit)
    if offset < _ZBOOT_HEADER.size or offset + size > len(image):
        raise QvmError(
            f"{path}: damaged EFI zboot header: payload [{offset:#x}, +{size:#x}) is not inside the file",
            hint="the file may be cut short; get it again",
        )
    return decompress(method, image[offset : offset + size], limit, path)
