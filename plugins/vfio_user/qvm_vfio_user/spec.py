"""Numbers of the vfio-user protocol, as QEMU's docs/interop/vfio-user.rst and linux/vfio.h have them.

Both sides are on one host, so numbers are in its byte order, which is little-endian wherever qvm runs.
"""

from __future__ import annotations

import enum
import struct


class Command(enum.IntEnum):
    """What a message asks for. 14 is DIRTY_PAGES of older texts; 11 and 12 go to the client only."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


#: Message ID, command, size with this header, flags, errno.
HEADER = struct.Struct("<HHIII")
TYPE_MASK, REPLY, NO_REPLY, ERROR = 0xF, 0x1, 0x10, 0x20

#: Major and minor version; JSON that ends in NUL follows.
VERSION = struct.Struct("<HH")
MAJOR, MINOR = 0, 1
#: What a capability is when a side says nothing of it.
DEFAULT_FDS, DEFAULT_TRANSFER = 1, 1 << 20

DMA_MAP = struct.Struct("<IIQQQ")  # argsz, flags, offset, address, size
MAP_READ, MAP_WRITE = 1, 2
DMA_UNMAP = struct.Struct("<IIQQ")  # argsz, flags, address, size
UNMAP_DIRTY_BITMAP, UNMAP_ALL = 1, 2

DEVICE_INFO = struct.Struct("<IIII")  # argsz, flags, number of regions, number of interrupt types
DEVICE_RESETS, DEVICE_PCI = 1, 2

REGION_INFO = struct.Struct("<IIIIQQ")  # argsz, flags, index, capability offset, size, offset for mmap
REGION_READABLE, REGION_WRITABLE = 1, 2
#: BAR n is region n; 6 is the ROM, 8 legacy VGA.
CONFIG_REGION, REGIONS = 7, 9
#: Functions here are conventional PCI, which has no more than this (PCI 3.0, 6.1).
CONFIG_SIZE = 256

IRQ_INFO = struct.Struct("<IIII")  # argsz, flags, index, count
IRQ_EVENTFD, IRQ_MASKABLE, IRQ_AUTOMASKED = 1, 2, 4
#: 1 is MSI, of which there are none. Errors (3) and requests to give the device back (4) are no types here.
INTX, MSIX, IRQS = 0, 2, 3

SET_IRQS = struct.Struct("<IIIII")  # argsz, flags, index, start, count
DATA_NONE, DATA_BOOL, DATA_EVENTFD = 0x01, 0x02, 0x04
ACTION_MASK, ACTION_UNMASK, ACTION_TRIGGER = 0x08, 0x10, 0x20
DATA_BITS, ACTION_BITS = 0x07, 0x38

ACCESS = struct.Struct("<QII")  # offset, region, count
WRITE_COUNT = struct.Struct("<Q")
WRITE = struct.Struct("<QII8s")  # an access and its data, of which count bytes count
