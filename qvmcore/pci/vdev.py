"""``PciVdev`` (floor 4): what the author of a PCI device subclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qvmcore.pci.bar import Bar
from qvmcore.pci.capability import Capability
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.types import DirectPart, MmioHandler, PciId, Window
from qvmcore.vdev import Vdev


@dataclass(frozen=True, slots=True)
class BarWindow(Window):
    """A window that becomes a BAR of a certain kind: 64-bit (``wide``), ``prefetchable``.

    ``number`` is the BAR it becomes, by default the first one behind the window before; ``direct`` are
    parts of it that an engine may map into the guest.
    """

    wide: bool = False
    prefetchable: bool = False
    number: int | None = None
    direct: tuple[DirectPart, ...] = ()


class PciVdev(Vdev):
    """A vdev that is a PCI function, with its ``windows`` as BARs.

    Window 0 is the first BAR, and so on; a plain :class:`Window` becomes a 32-bit BAR. Sizes are
    powers of two. ``irqs`` lines each get an MSI-X vector, unless ``msix`` is False; a guest that
    does not use MSI-X sees them all on ``INTA#``, so hold a level with ``ctx.irq(n).set(True)``
    until the guest has read why. ``mmio_read`` and ``mmio_write`` are the BARs' accesses, as ever.

    ``pci_class`` is base class, sub-class, interface: ``0x058000``. These, and ``capabilities``, may
    also be set on the instance in ``__init__`` or ``on_configured``; windows whose size is an option
    come from ``bars``. The function is made after ``on_configured``.
    """

    pci_id: PciId
    pci_class: int
    capabilities: Sequence[Capability] = ()
    msix: ClassVar[bool] = True
    #: MSI-X vectors, when only the instance knows how many; set by ``on_configured``. Vectors beyond the
    #: lines are signalled by ``function.interrupts.signal(vector)``: see :meth:`on_function`.
    vectors: int | None = None
    #: Whether this instance of a class with a line has ``INTA#``; set by ``on_configured``.
    intx: bool = True

    def bars(self) -> Sequence[Window]:
        """The windows of this instance, index 0 first; by default those of the class."""
        return self.windows

    def on_function(self, function: PciFunction) -> None:
        """The function was made, on the main thread, after ``on_configured`` and before ``on_starting``.

        For a vdev that follows what the guest does with it: ``function.on_bus_master`` and
        ``function.interrupts.on_msix`` are its to set.
        """

    def config_read(self, offset: int, size: int) -> int:
        """Bytes of configuration space that are neither header nor a known capability; default 0."""
        return 0

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The guest wrote such bytes; default ignored. ``offset`` from the start of the space."""


def interrupts_of(cls: type[PciVdev]) -> PciInterrupts:
    """The interrupts of a class: one vector per line."""
    return PciInterrupts(cls.irqs if cls.msix else 0, intx=cls.irqs > 0)


def function_of(vdev: PciVdev, interrupts: PciInterrupts) -> PciFunction:
    """The function of a configured vdev. Raises ValueError for an impossible declaration."""
    bars, number = [], 0
    for index, window in enumerate(vdev.bars()):
        wide = isinstance(window, BarWindow) and window.wide
        prefetchable = isinstance(window, BarWindow) and window.prefetchable
        if isinstance(window, BarWindow) and window.number is not None:
            number = window.number
        bars.append(Bar(number, window, _window_handler(vdev, index), wide, prefetchable))
        number += 1 + wide
    if vdev.vectors is not None:
        interrupts.resize(vdev.vectors)
    interrupts.intx &= vdev.intx
    function = PciFunction(
        vdev.pci_id,
        vdev.pci_class,
        bars=bars,
        capabilities=vdev.capabilities,
        interrupts=interrupts,
        private=MmioHandler(vdev.config_read, vdev.config_write),
    )
    vdev.on_function(function)
    return function


def _window_handler(vdev: PciVdev, index: int) -> MmioHandler:
    read, write = vdev.mmio_read, vdev.mmio_write
    window = vdev.bars()[index]
    return MmioHandler(
        lambda offset, size: read(index, offset, size),
        lambda offset, size, value: write(index, offset, size, value),
        direct=window.direct if isinstance(window, BarWindow) else (),
    )
