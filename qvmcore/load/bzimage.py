"""The bzImage of Linux (floor 8): its setup header, its place, and boot_params.

Documentation/arch/x86/boot.rst, "64-bit Boot Protocol" (2.12 and later): the protected-mode part of
the file goes to ``pref_address``, or higher at a multiple of ``kernel_alignment``; ``init_size`` bytes
from there are the kernel's; the CPU starts in long mode 0x200 behind its first byte with RSI =
boot_params. Names of fields are those of that document, offsets those of the file.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from qvmcore.errors import QvmError
from qvmcore.load.common import file_size, load_part, ram_hint
from qvmcore.load.room import Room
from qvmcore.load.x86_boot import BOOT_PARAMS, FOUR_GIB, ONE_MIB, PAGE, MapEntry, e820_table
from qvmcore.memory import GuestMemory
from qvmcore.options import format_size

_SECTOR = 512
_HEADER = 0x1F1
#: The header's own length byte can say more than boot_params has room for.
_HEADER_END_MAX = 0x290
_ENTRY_64 = 0x200
_VERSION_64 = 0x20C
_LOADED_HIGH = 0x01
_KERNEL_64 = 0x01
_UNDEFINED_LOADER = 0xFF
_NORMAL_VIDEO_MODE = 0xFFFF


class BzImage(NamedTuple):
    """The fields of a setup header that placing the kernel takes. Sizes and offsets are bytes."""

    path: Path
    header: bytes
    offset: int
    size: int
    alignment: int
    relocatable: bool
    preferred: int
    init_size: int
    initrd_max: int
    cmdline_max: int


def read_bzimage(path: Path, head: bytes) -> BzImage:
    """Check the header in ``head``, the first KiB of the file.

    Raises QvmError for a kernel without a 64-bit entry, an old or a damaged one, or a file cut short.
    """

    def field(layout: str, offset: int) -> int:
        value: int = struct.unpack_from("<" + layout, head, offset)[0]
        return value

    if len(head) < _HEADER_END_MAX:
        raise _damaged(path, "the file ends in the header")
    version = field("H", 0x206)
    if version < _VERSION_64:
        raise QvmError(
            f"{path}: an x86 kernel of boot protocol {version >> 8}.{version & 0xFF:02};"
            " 2.12 is the first with a 64-bit entry",
            hint="use a 64-bit kernel of Linux 3.8 or later",
        )
    if not field("H", 0x236) & _KERNEL_64:
        raise QvmError(
            f"{path}: a 32-bit x86 kernel (bzImage without a 64-bit entry)",
            hint="use a kernel for x86-64 (amd64), or the vmlinux of this one",
        )
    if not field("B", 0x211) & _LOADED_HIGH:
        raise QvmError(f"{path}: a zImage, which is loaded below 1 MiB", hint="build a bzImage")
    offset = ((field("B", 0x1F1) or 4) + 1) * _SECTOR
    # What is behind it in the file, as a signature, is not part of the kernel.
    size = field("I", 0x1F4) * 16
    alignment, preferred, init_size = field("I", 0x230), field("Q", 0x258), field("I", 0x260)
    if offset + size > file_size(path):
        raise _damaged(path, f"the kernel [{offset:#x}, +{size:#x}) is not inside the file")
    if size <= _ENTRY_64:
        raise _damaged(path, f"a kernel of {size} bytes")
    if alignment & alignment - 1 or not PAGE <= alignment <= 1 << 30:
        raise _damaged(path, f"an alignment of {alignment:#x}")
    return BzImage(
        path, head[_HEADER : min(0x202 + field("B", 0x201), _HEADER_END_MAX)], offset, size, alignment,
        bool(field("B", 0x234)), preferred, max(init_size, size),
        field("I", 0x22C), field("I", 0x238),
    )  # fmt: skip


def place_bzimage(image: BzImage, memory: GuestMemory, room: Room) -> int:
    """Read the kernel to its place in RAM; the place. Raises QvmError when there is none, HostError."""
    what = f"{image.path}: the kernel with its work space"
    # Below pref_address the kernel would move itself up and overwrite what is there.
    last = FOUR_GIB if image.relocatable else image.preferred + image.init_size
    step = image.alignment if image.relocatable else 1
    start = room.lowest(image.init_size, max(image.preferred, ONE_MIB), min(last, FOUR_GIB), step)
    if start is None:
        where = f"at {image.preferred:#x}" + (" or above" if image.relocatable else "")
        message = f"{what} ({format_size(image.init_size)} {where}) does not fit into RAM"
        raise QvmError(message, hint=ram_hint(memory))
    room.take(what, [(start, image.init_size)])
    load_part(image.path, image.offset, memory.view(start, image.size))
    return start


def entry_of(start: int) -> int:
    """Where a kernel placed at ``start`` is entered in long mode."""
    return start + _ENTRY_64


def put_boot_params(
    memory: GuestMemory,
    room: Room,
    entries: list[MapEntry],
    *,
    header: bytes = b"",
    start: int = 0,
    cmdline: int,
    initrd: tuple[int, int] | None,
    rsdp: int,
) -> int:
    """struct boot_params with the setup header of a kernel at ``start``, if there is one; its address.

    ``initrd`` is (address, size); ``cmdline`` and ``rsdp`` are addresses, 0 for none.
    """
    page = bytearray(PAGE)

    def put(layout: str, offset: int, value: int) -> None:
        struct.pack_into("<" + layout, page, offset, value)

    page[_HEADER : _HEADER + len(header)] = header
    put("H", 0x1FA, _NORMAL_VIDEO_MODE)
    put("B", 0x210, _UNDEFINED_LOADER)
    put("I", 0x214, start)
    put("I", 0x228, cmdline)
    put("Q", 0x070, rsdp)
    address, size = initrd or (0, 0)
    put("I", 0x218, address & 0xFFFF_FFFF)
    put("I", 0x21C, size & 0xFFFF_FFFF)
    put("I", 0x0C0, address >> 32)
    put("I", 0x0C4, size >> 32)
    # Chains of setup_data are the loader's to make, and this one makes none.
    put("Q", 0x250, 0)
    put("B", 0x1E8, len(entries))
    table = e820_table(entries)
    page[0x2D0 : 0x2D0 + len(table)] = table
    room.take("boot_params", [(BOOT_PARAMS, PAGE)])
    memory.write(BOOT_PARAMS, page)
    return BOOT_PARAMS


def _damaged(path: Path, what: str) -> QvmError:
    return QvmError(f"{path}: damaged bzImage: {what}", hint="the file may be cut short; get it again")
