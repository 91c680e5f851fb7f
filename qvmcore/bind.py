"""Freeze (floor 8): the one bridge from hooks, which are slow, to bound handlers, which are fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qvmcore.bus import AddressSpace
from qvmcore.engine import Guest
from qvmcore.errors import ConfigError, Diagnostic, PluginError
from qvmcore.hookspecs import hookimpl
from qvmcore.irq import IrqLine
from qvmcore.plugins import PluginHost
from qvmcore.slot import VdevSlot
from qvmcore.types import IntrSpec, MmioHandler, VdevSpec, Window
from qvmcore.vdev import Vdev, VdevContext
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.mmio import MmioTransport


class DefaultBindings:
    """The core's own hook implementations; they answer last, so any plugin can take their place."""

    @hookimpl(trylast=True)
    def qvm_create_vdev(self, spec: VdevSpec, cls: type[Vdev], ctx: VdevContext) -> Vdev:
        """Call the class."""
        return cls(ctx, spec.options)

    @hookimpl(trylast=True)
    def qvm_bind_mmio(self, vdev: Vdev, index: int, window: Window) -> MmioHandler:
        """The virtio-mmio transport for a virtio vdev, the vdev's own methods for any other."""
        if isinstance(vdev, VirtioVdev):
            return MmioTransport(vdev).handler()
        return _own_methods(vdev.mmio_read, vdev.mmio_write, index)

    @hookimpl(trylast=True)
    def qvm_bind_irq(self, vdev: Vdev, index: int, intr: IntrSpec, guest: Guest) -> IrqLine:
        """The line of the engine's interrupt controller."""
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
        intr = slot.spec.intr
        for index in range(slot.cls.irqs if intr is not None else 0):
            assert intr is not None
            line = IntrSpec(intr.controller, intr.number + index)
            slot.lines[index] = host.bind_irq(slot.vdev, index, line, guest)


def bind_windows(slots: Sequence[VdevSlot], host: PluginHost, bus: AddressSpace) -> None:
    """Bind every window and freeze the bus. Raises ConfigError or PluginError."""
    for slot in slots:
        spec = slot.spec
        base = spec.loc
        for index, window in enumerate(slot.cls.windows):
            handler = host.bind_mmio(slot.vdev, index, window)
            if not isinstance(handler, MmioHandler):
                raise PluginError(f"{spec.where}: qvm_bind_mmio gave {handler!r}, not an MmioHandler")
            if base is None:
                problem = Diagnostic(
                    spec.source.file, spec.source.line, spec.where, "no loc for its registers"
                )
                raise ConfigError([problem])
            bus.insert(base, window, slot.guard(handler), spec.name)
            base += window.size
    bus.freeze()
