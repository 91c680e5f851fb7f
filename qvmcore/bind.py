"""Freeze (floor 8): the one bridge from hooks, which are slow, to bound handlers, which are fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qvmcore.bus import AddressSpace
from qvmcore.engine import Guest
from qvmcore.errors import ConfigError, Diagnostic, PluginError
from qvmcore.hookspecs import hookimpl
from qvmcore.irq import IrqLine
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.plugins import PluginHost
from qvmcore.slot import VdevSlot
from qvmcore.types import IntrSpec, MmioHandler, PciAddress, VdevSpec, Window
from qvmcore.vdev import Vdev, VdevContext
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.mmio import MmioTransport


class DefaultBindings:
    """The core's own hook implementations; they answer last, so any plugin can take their place.

    One object for each machine: it knows the PCI functions and interrupts of its vdevs, by ``id``.
    """

    def __init__(self) -> None:
        #: Whether the engine signals doorbells by itself; the machine sets it before anything is bound.
        self.fast_doorbells = False
        self.functions: dict[int, PciFunction] = {}
        self.interrupts: dict[int, PciInterrupts] = {}

    def forget(self, vdev: Vdev) -> None:
        """The vdev is gone; another one may get its ``id``."""
        self.functions.pop(id(vdev), None)
        self.interrupts.pop(id(vdev), None)

    @hookimpl(trylast=True)
    def qvm_create_vdev(self, spec: VdevSpec, cls: type[Vdev], ctx: VdevContext) -> Vdev:
        """Call the class."""
        return cls(ctx, spec.options)

    @hookimpl(trylast=True)
    def qvm_bind_mmio(self, vdev: Vdev, index: int, window: Window) -> MmioHandler:
        """A BAR of its PCI function, the virtio-mmio transport, or the vdev's own methods."""
        function = self.functions.get(id(vdev))
        if function is not None:
            return function.bars[index].handler
        if isinstance(vdev, VirtioVdev):
            return MmioTransport(vdev, fast_doorbells=self.fast_doorbells).handler()
        return _own_methods(vdev.mmio_read, vdev.mmio_write, index)

    @hookimpl(trylast=True)
    def qvm_bind_pci_config(self, vdev: Vdev, address: PciAddress) -> MmioHandler:
        """The function's own configuration space."""
        function = self.functions[id(vdev)]
        return MmioHandler(function.config_read, function.config_write)

    @hookimpl(trylast=True)
    def qvm_bind_irq(self, vdev: Vdev, index: int, intr: IntrSpec, guest: Guest) -> IrqLine:
        """A source of its PCI function, or the line of the engine's interrupt controller."""
        interrupts = self.interrupts.get(id(vdev))
        if interrupts is not None:
            return interrupts.line(index)
        return guest.irq_line(intr)


def _own_methods(
    read: Callable[[int, int, int], int], write: Callable[[int, int, int, int], None], index: int
) -> MmioHandler:
    return MmioHandler(
        lambda offset, size: read(index, offset, size),
        lambda offset, size, value: write(index, offset, size, value),
    )


def bind_irqs(slots: Sequence[VdevSlot], host: PluginHost, guest: Guest) -> None:
    """Bind every interrupt line, before any vdev is configured: its worker may signal at once."""
    for slot in slots:
        intr = slot.spec.intr if slot.spec.pci is None else None
        for index in range(slot.cls.irqs if intr is not None else 0):
            assert intr is not None
            line = IntrSpec(intr.controller, intr.number + index)
            slot.lines[index] = host.bind_irq(slot.vdev, index, line, guest)


def bind_window(slot: VdevSlot, host: PluginHost, index: int, window: Window) -> MmioHandler:
    """The guarded handler of a window. Raises PluginError when a hook gave something else."""
    handler = host.bind_mmio(slot.vdev, index, window)
    if not isinstance(handler, MmioHandler):
        raise PluginError(f"{slot.spec.where}: qvm_bind_mmio gave {handler!r}, not an MmioHandler")
    return slot.guard(handler)


def bind_windows(
    slots: Sequence[VdevSlot], host: PluginHost, bus: AddressSpace, ports: AddressSpace | None = None
) -> None:
    """Bind every window of the vdevs with an address or a port. Raises ConfigError or PluginError."""
    for slot in slots:
        spec = slot.spec
        if spec.pci is not None:
            continue
        base = spec.loc
        space = ports if spec.space == "io" and ports is not None else bus
        for index, window in enumerate(slot.cls.windows):
            handler = bind_window(slot, host, index, window)
            if base is None:
                problem = Diagnostic(
                    spec.source.file, spec.source.line, spec.where, "no loc for its registers"
                )
                raise ConfigError([problem])
            space.insert(base, window, handler, spec.name)
            base += window.size
