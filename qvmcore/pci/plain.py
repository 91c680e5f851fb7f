"""A vdev made for direct memory mapping as a PCI function (floor 4), where a bus is all there is.

Its windows become BARs, its interrupts MSI-X vectors or ``INTA#``. Nobody has given it a PCI identity, so
it has the last one of its vendor and no class: drivers find it by what its author says.
"""

from __future__ import annotations

from functools import partial

from qvmcore.bus import all_ones
from qvmcore.pci.bar import Bar
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.types import MmioHandler, PciId, Window
from qvmcore.vdev import Vdev

PLAIN_ID = PciId(0x1C05, 0xFFFF)
PLAIN_CLASS = 0xFF0000
_PAGE = 4096


def plain_function_of(vdev: Vdev, interrupts: PciInterrupts) -> PciFunction:
    """The function of a vdev that knows nothing of PCI. Raises ValueError when it does not fit into one.

    BAR ``n`` is window ``n``, rounded up to a power of two and a page; behind its end reads give all ones.
    """
    bars = [
        Bar(number, _rounded(window), _within(vdev, number)) for number, window in enumerate(vdev.windows)
    ]
    return PciFunction(PLAIN_ID, PLAIN_CLASS, bars=bars, interrupts=interrupts)


def _rounded(window: Window) -> Window:
    return Window(max(_PAGE, 1 << (window.size - 1).bit_length()), window.access)


def _within(vdev: Vdev, index: int) -> MmioHandler:
    size_of = vdev.windows[index].size
    read, write = partial(vdev.mmio_read, index), partial(vdev.mmio_write, index)
    return MmioHandler(
        lambda offset, size: read(offset, size) if offset + size <= size_of else all_ones(size),
        lambda offset, size, value: write(offset, size, value) if offset + size <= size_of else None,
    )
