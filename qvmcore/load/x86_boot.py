"""What an x86 guest finds in memory when it starts (floor 8): memory map, segments, page tables, start info.

Places below 1 MiB, all in bytes::

    0x00500  table of four segment descriptors (protected32, long64)
    0x06000  start_info with module list and memory map (protected32)
    0x07000  boot_params, "zero page" (long64)
    0x09000  six page tables: 4 GiB in 2 MiB pages, virtual = physical (long64)
    0x20000  command line, with its final NUL
    0xA0000  to 0xFFFFF: reserved in the memory map; a PC has its frame buffer and its BIOS there

The top of the first 640 KiB stays free: an unpacking Linux kernel puts its trampoline there, in
memory that it clears while it still runs on these page tables.

Specs: Documentation/arch/x86/boot.rst and zero-page.rst of Linux, xen/include/public/arch-x86/hvm/
start_info.h ("PVH"), ACPI 6.5 section 15 for the types of memory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qvmcore.errors import QvmError
from qvmcore.load.room import Room
from qvmcore.memory import GuestMemory

GDT = 0x500
START_INFO = 0x6000
BOOT_PARAMS = 0x7000
PAGE_TABLES = 0x9000
CMDLINE = 0x2_0000
#: Memory below is used as listed above; every PC has it.
LOW_RAM = 0xA_0000
ONE_MIB = 1 << 20
FOUR_GIB = 1 << 32

PAGE = 4096
#: Entries of the memory map that boot_params holds.
E820_MAX = 128
#: Longest command line: the room up to the end of low RAM is far larger, no kernel keeps more.
CMDLINE_MAX = 1 << 16

_USABLE, _RESERVED = 1, 2
_E820 = struct.Struct("<QQI")

# Flat 4 GiB segments, present, accessed, ring 0 (Intel SDM volume 3, 3.4.5).
_CODE32, _CODE64, _DATA = 0x00CF_9B00_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF

_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
_MIB2 = 2 << 20
_TABLES = 6  # one PML4, one page of page-directory pointers, four directories of 1 GiB each

_START_INFO = struct.Struct("<IIIIQQQQII")
_START_INFO_MAGIC = 0x336E_C578
_MODULE = struct.Struct("<QQQQ")
_MEMORY = struct.Struct("<QQII")


class MapEntry(NamedTuple):
    """A range of the memory map: ``kind`` 1 is RAM to use, 2 is reserved."""

    start: int
    size: int
    kind: int


def memory_map(memory: GuestMemory, reserved: Iterable[tuple[int, int]] = ()) -> list[MapEntry]:
    """The E820 map: every region of guest memory, split where ``reserved`` (address, size) says so.

    The last 384 KiB of the first MiB and ROM are reserved, too; reserved ranges grow to whole pages.
    Entries are in address order, touch no other, and cover guest memory exactly. Raises QvmError when
    there are more than boot_params holds.
    """
    holes = [(LOW_RAM, ONE_MIB)]
    holes += [(start // PAGE * PAGE, -(-(start + size) // PAGE) * PAGE) for start, size in reserved if size]
    holes.sort()
    entries: list[MapEntry] = []

    def add(start: int, end: int, kind: int) -> None:
        if start >= end:
            return
        last = entries[-1] if entries else MapEntry(0, 0, 0)
        if last.kind == kind and last.start + last.size == start:
            entries[-1] = MapEntry(last.start, end - last.start, kind)
        else:
            entries.append(MapEntry(start, end - start, kind))

    for region in memory.regions:
        at = region.start
        for start, end in holes:
            start, end = max(start, at), min(end, region.end)
            if start < end:
                add(at, start, _RESERVED if region.rom else _USABLE)
                add(start, end, _RESERVED)
                at = end
        add(at, region.end, _RESERVED if region.rom else _USABLE)
    if len(entries) > E820_MAX:
        raise QvmError(f"the memory map has {len(entries)} ranges; a guest takes at most {E820_MAX}")
    return entries


def e820_table(entries: Sequence[MapEntry]) -> bytes:
    """The entries as boot_params has them."""
    return b"".join(_E820.pack(*entry) for entry in entries)


def need_low_ram(memory: GuestMemory) -> None:
    """Raise QvmError when the first 640 KiB are not RAM."""
    if not memory.contains(0, LOW_RAM):
        raise QvmError(
            f"RAM does not hold [0x0, {LOW_RAM:#x}), where a PC starts a kernel from",
            hint='write ram = "64M" or more',
        )


def put_gdt(memory: GuestMemory, room: Room, *, long: bool) -> int:
    """The segment table: 0x10 is flat code (64-bit when ``long``), 0x18 flat data; its address."""
    table = struct.pack("<4Q", 0, 0, _CODE64 if long else _CODE32, _DATA)
    room.take("the boot segment table", [(GDT, len(table))])
    memory.write(GDT, table)
    return GDT


def put_page_tables(memory: GuestMemory, room: Room) -> int:
    """Page tables in which the first 4 GiB are mapped to themselves; address of the first one."""
    room.take("the boot page tables", [(PAGE_TABLES, _TABLES * PAGE)])
    pointers, directories = PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE
    memory.write(PAGE_TABLES, struct.pack("<Q", pointers | _PRESENT_WRITABLE))
    count = _TABLES - 2
    links = (directories + index * PAGE | _PRESENT_WRITABLE for index in range(count))
    memory.write(pointers, struct.pack(f"<{count}Q", *links))
    # 1 GiB pages would need one table less, but not every CPU has them.
    pages = (page * _MIB2 | _LARGE | _PRESENT_WRITABLE for page in range(count * 512))
    memory.write(directories, struct.pack(f"<{count * 512}Q", *pages))
    return PAGE_TABLES


def put_cmdline(memory: GuestMemory, room: Room, text: str, limit: int = CMDLINE_MAX) -> int:
    """The command line and its NUL; its address, 0 for an empty one. ``limit`` is bytes without the NUL."""
    data = os.fsencode(text)
    if not data:
        return 0
    if len(data) > min(limit, CMDLINE_MAX):
        raise QvmError(f"the command line has {len(data)} bytes; this kernel takes at most {limit}")
    room.take("the command line", [(CMDLINE, len(data) + 1)])
    memory.write(CMDLINE, data + b"\0")
    return CMDLINE


def put_start_info(
    memory: GuestMemory,
    room: Room,
    entries: Sequence[MapEntry],
    *,
    cmdline: int,
    initrd: tuple[int, int] | None,
    rsdp: int,
) -> int:
    """hvm_start_info of version 1; ``initrd`` is (address, size). Its address."""
    modules = [_MODULE.pack(*initrd, 0, 0)] if initrd is not None else []
    module_list = START_INFO + _START_INFO.size
    map_at = module_list + _MODULE.size * len(modules)
    data = _START_INFO.pack(
        _START_INFO_MAGIC, 1, 0, len(modules), module_list if modules else 0,
        cmdline, rsdp, map_at, len(entries), 0,
    )  # fmt: skip
    data += b"".join(modules) + b"".join(_MEMORY.pack(*entry, 0) for entry in entries)
    room.take("the start info", [(START_INFO, len(data))])
    memory.write(START_INFO, data)
    return START_INFO
