"""The registers of a physical PCI function that quiescing touches (PCI 3.0, PCI Express Base 6).

Offsets are bytes in configuration space; a capability's registers are relative to where it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

VENDOR_ID, COMMAND, STATUS, CLASS_REVISION, CAPABILITIES = 0x00, 0x04, 0x06, 0x08, 0x34
BAR0, BAR_COUNT, INTERRUPT_PIN, HEADER_SIZE, CONFIG_SIZE = 0x10, 6, 0x3D, 0x40, 0x100

COMMAND_IO, COMMAND_MEMORY, COMMAND_BUS_MASTER = 1 << 0, 1 << 1, 1 << 2
COMMAND_DECODE = COMMAND_IO | COMMAND_MEMORY
COMMAND_INTX_DISABLE = 1 << 10
STATUS_INTERRUPT, STATUS_CAPABILITIES = 1 << 3, 1 << 4

CAP_PM, CAP_MSI, CAP_EXPRESS, CAP_MSIX, CAP_AF = 0x01, 0x05, 0x10, 0x11, 0x13
EXT_ATS, EXT_PRI = 0x000F, 0x0013
_EXT_START, _EXT_END = 0x100, 0x1000

PM_CONTROL, PM_STATE, PM_D3HOT, PM_NO_SOFT_RESET = 4, 0x3, 0x3, 1 << 3
MSI_CONTROL, MSI_ENABLE = 2, 1 << 0
MSIX_CONTROL, MSIX_ENABLE, MSIX_MASK = 2, 1 << 15, 1 << 14
EXPRESS_DEVICE_CAPABILITIES, EXPRESS_FLR = 4, 1 << 28
EXPRESS_DEVICE_CONTROL, EXPRESS_START_FLR = 8, 1 << 15
EXPRESS_DEVICE_STATUS, EXPRESS_PENDING = 10, 1 << 5
AF_CAPABILITIES, AF_HAS_PENDING, AF_HAS_FLR = 3, 1 << 0, 1 << 1
AF_CONTROL, AF_START_FLR = 4, 1 << 0
AF_STATUS, AF_PENDING = 5, 1 << 0
ATS_CONTROL, ATS_ENABLE = 6, 1 << 15
PRI_CONTROL, PRI_ENABLE = 4, 1 << 0

#: What a read of a function that is not there, or not ready yet, gives (Express 2.3.1: 0x0001 is RRS).
ABSENT, NOT_READY = 0xFFFF, 0x0001

Read = Callable[[int, int], int]


def capabilities(read: Read) -> dict[int, int]:
    """Capability ID -> offset; the first of each. ``read(offset, size)``; bounded, whatever it answers."""
    found: dict[int, int] = {}
    if read(STATUS, 2) & STATUS_CAPABILITIES:
        for offset in _chain(read):
            found.setdefault(read(offset, 1), offset)
    return found


def _chain(read: Read) -> Iterator[int]:
    offset = read(CAPABILITIES, 1) & 0xFC
    for _ in range((CONFIG_SIZE - HEADER_SIZE) // 4):
        if offset < HEADER_SIZE:
            return
        yield offset
        offset = read(offset + 1, 1) & 0xFC


def extended_capabilities(read: Read) -> dict[int, int]:
    """Extended capability ID -> offset; empty for a function without them."""
    found: dict[int, int] = {}
    offset = _EXT_START
    for _ in range((_EXT_END - _EXT_START) // 8):
        header = read(offset, 4)
        if header in (0, 0xFFFF_FFFF):
            break
        found.setdefault(header & 0xFFFF, offset)
        offset = header >> 20 & 0xFFC
        if offset < _EXT_START:
            break
    return found
