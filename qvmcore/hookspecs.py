"""The hooks of qvm (floor 6). Hooks *bind*: they are asked while a machine is built, never per access.

Every hook is called on the main thread, before the first guest instruction. An implementation may
take fewer arguments than the specification. To observe or to inject faults, wrap a bind hook with
``@hookimpl(wrapper=True)``; who does not install the wrapper does not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pluggy

from qvmcore.engine import Engine, Guest
from qvmcore.irq import IrqLine
from qvmcore.server import Server
from qvmcore.termination import TerminationCallback
from qvmcore.types import IntrSpec, MmioHandler, PciAddress, VdevSpec, Window
from qvmcore.vdev import Vdev, VdevContext

if TYPE_CHECKING:
    import click

#: Name of the pluggy project; entry-point groups carry the API major version as well.
PROJECT = "qvm"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qvm_vdev_types() -> Iterable[type[Vdev]]:  # type: ignore[empty-body]
    """Discovery: the Vdev classes of a plugin. Opens nothing.

    The plugin is an entry point of the group ``qvm.vdev.v1`` whose name is the vdev type::

        @hookimpl
        def qvm_vdev_types():
            return [Hello]
    """


@hookspec
def qvm_engines() -> Iterable[Engine]:  # type: ignore[empty-body]
    """Discovery: the engines of a plugin (entry-point group ``qvm.engine.v1``)."""


@hookspec
def qvm_servers() -> Iterable[Server]:  # type: ignore[empty-body]
    """Discovery: the servers of a plugin for ``qvm serve`` (entry-point group ``qvm.server.v1``)."""


@hookspec
def qvm_cli_commands(register: Callable[[str, click.Command], None]) -> None:
    """Discovery: sub-commands of ``qvm`` (entry-point group ``qvm.command.v1``)::

    @hookimpl
    def qvm_cli_commands(register):
        register("guest", guest_command)
    """


@hookspec(firstresult=True)
def qvm_create_vdev(spec: VdevSpec, cls: type[Vdev], ctx: VdevContext) -> Vdev | None:
    """Create one vdev; the core's own implementation answers last with ``cls(ctx, spec.options)``."""


@hookspec(firstresult=True)
def qvm_bind_mmio(vdev: Vdev, index: int, window: Window) -> MmioHandler | None:
    """At freeze, once per window: who handles the accesses to window ``index`` of ``vdev``.

    The windows of a vdev on PCI are the BARs of its function, in order, the MSI-X table last.

    Trace, record or inject by wrapping::

        @hookimpl(wrapper=True)
        def qvm_bind_mmio(vdev, index):
            handler = yield
            return traced(vdev, index, handler)
    """


@hookspec(firstresult=True)
def qvm_bind_pci_config(vdev: Vdev, address: PciAddress) -> MmioHandler | None:
    """At freeze, once per PCI function: who handles the accesses to its 4096 bytes of configuration.

    Offsets are from the start of its configuration space; by default the function of the vdev
    answers. Hide a capability or record what a driver looks for by wrapping.
    """


@hookspec(firstresult=True)
def qvm_bind_irq(vdev: Vdev, index: int, intr: IntrSpec, guest: Guest) -> IrqLine | None:
    """At freeze, once per interrupt: the line of ``intr``; by default ``guest.irq_line(intr)``.

    For a PciVdev ``intr`` is where its INTx goes, and the line also sends its MSI-X messages. A
    virtio device on PCI signals through its transport and is not asked about.
    """


@hookspec
def qvm_termination_callbacks(machine: Any) -> Iterable[TerminationCallback]:  # type: ignore[empty-body]
    """Steps of the end that belong to no single vdev, collected when every vdev is configured.

    ``machine`` is the :class:`qvmcore.machine.Machine`: read its ``spec`` and ``slots``. Nothing has been
    started: the place to get ready for the end. Raise a QvmError to refuse the start.
    """
