"""Which pages of a BAR a guest may reach by itself: all but those of the device's own MSI-X structures."""

from __future__ import annotations

import mmap

from qvm_quiesce import pci

from qvm_vfio.device import VfioDevice

_TABLE, _PENDING = 4, 8
_BAR_MASK, _SIZE_MASK = 0x7, 0x7FF


def runs(device: VfioDevice, bar: int, msix_at: int | None) -> list[tuple[int, int]]:
    """(offset, size) of each run of whole pages; ``msix_at`` is where the capability is. Raises VfioError."""
    region = device.regions.get(bar)
    if region is None:
        return []
    found, start = [], 0
    end = region.size // mmap.PAGESIZE * mmap.PAGESIZE
    for taken, behind in [*_msix(device, bar, msix_at), (end, end)]:
        if taken > start:
            found.append((start, min(taken, end) - start))
        start = max(start, behind)
    return [(offset, size) for offset, size in found if size > 0]


def _msix(device: VfioDevice, bar: int, at: int | None) -> list[tuple[int, int]]:
    """The pages of the vector table and of the pending bits in a BAR, as (first byte, byte behind)."""
    if at is None:
        return []
    count = (device.config_read(at + pci.MSIX_CONTROL, 2) & _SIZE_MASK) + 1
    page, taken = mmap.PAGESIZE, []
    for register, size in ((_TABLE, 16 * count), (_PENDING, (count + 63) // 64 * 8)):
        where = device.config_read(at + register, 4)
        start = where & ~_BAR_MASK
        if where & _BAR_MASK == bar:
            taken.append((start // page * page, -(-(start + size) // page) * page))
    return sorted(taken)
