"""What a vdev author subclasses and receives (floor 3).

Life of a vdev, in order, with the thread each method runs on::

    __init__(ctx, options)    main      opens nothing, starts nothing
    on_configured()           main      open host resources; ctx.worker may be used from here
    on_starting()             main      last chance to refuse, just before the first instruction
    mmio_read / mmio_write    a vCPU    slot lock held; must not block
    on_reset()                a vCPU    the guest's or framework's reset of the device
    on_button()               main      power button (SIGTERM, SIGINT)
    status()                  any       cheap
    on_terminate(end)         its own   Phase.RELEASE; idempotent, bounded, also after a half-made start

Framework state lives in the slot, so authors never call ``super()``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgspec

from qvmcore.events import Worker
from qvmcore.irq import IrqLine
from qvmcore.memory import GuestMemory
from qvmcore.termination import Phase
from qvmcore.types import GuestEnd, IntrSpec, Trigger, Window


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vdev without options of its own."""


class FdtNode(Protocol):
    """The FDT node of a vdev while it is being described. ``name`` is without the unit address."""

    def set_string(self, name: str, *values: str) -> None:
        """A property of one or more strings."""

    def set_cells(self, name: str, *values: int) -> None:
        """A property of 32-bit cells."""

    def set_flag(self, name: str) -> None:
        """An empty property."""

    def reference(self, path: str) -> int:
        """The phandle of another node by path, e.g. ``/apb-pclk``."""

    def phandle(self) -> int:
        """This node's own phandle."""

    def sibling(self, name: str) -> FdtNode:
        """Another node beside this one at the root, created when missing."""

    def child(self, name: str) -> FdtNode:
        """A child node, created when missing."""


class VdevContext(Protocol):
    """Every power a vdev has, handed in: no globals, no environment, no signal handlers."""

    name: str
    #: The VM's name, ``system.name`` of the VM file.
    machine: str
    memory: GuestMemory
    log: logging.LoggerAdapter[logging.Logger]
    #: Where relative host paths in the options start: the directory of the VM file.
    base_dir: Path

    @property
    def worker(self) -> Worker:
        """The vdev's own thread, made at first use; allowed from ``on_configured``."""

    def irq(self, index: int = 0) -> IrqLine:
        """The bound interrupt line; usable from ``on_starting`` on, any thread."""

    @property
    def intr(self) -> IntrSpec | None:
        """The interrupt as the VM file writes it (``gic:41``); None when a PCI function has no own."""

    def address(self, window: int = 0) -> int | None:
        """Where the guest sees a window now, guest-physical; None for a BAR that is not decoded.

        For devices that tell the guest about it. From ``on_starting`` on, any thread.
        """

    def on_terminate(self, run: Callable[[GuestEnd], None], *, phase: Phase, deadline: float = 1.0) -> None:
        """Add a step to the end of the VM; allowed until the guest starts. Deadline in seconds."""

    def request_shutdown(self, message: str, *, code: int = 6) -> None:
        """End the VM in order, asynchronously, from any thread.

        ``code`` is the exit code: 0 the guest asked to power off, 3 the power was cut, 6 the vdev
        failed, 32 to 63 the vdev's own. ValueError for any other.
        """

    def request_reset(self, message: str) -> None:
        """The guest asked for a reset of the machine: end the VM in order, with exit code 0; any thread."""

    def press_power_button(self) -> None:
        """Ask the VM for a power button press, as SIGTERM does; any thread."""

    def fault(self, error: BaseException) -> None:
        """Report that this device is broken: it is isolated, or the VM ends, as ``on_fault`` says."""


class Vdev:
    """A virtual device with registers in MMIO windows.

    Declared on the class: ``vdev_type`` (must equal the entry point's name), ``Options`` (a frozen
    msgspec.Struct), ``windows``, ``irqs``, ``trigger`` and how a guest is told of it. ``summary`` is one
    line for ``qvm vdev``. ``api`` is the oldest API minor version the vdev needs, a literal.
    """

    vdev_type: ClassVar[str]
    summary: ClassVar[str] = ""
    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    windows: ClassVar[tuple[Window, ...]] = ()
    irqs: ClassVar[int] = 0
    trigger: ClassVar[Trigger] = Trigger.EDGE
    fdt_compatible: ClassVar[tuple[str, ...]] = ()
    #: Announced under this ACPI hardware ID on a board described by ACPI; empty = not at all.
    acpi_hid: ClassVar[str] = ""
    #: It gives the guest a physical device, which has to be quiesced when the VM ends.
    physical: ClassVar[bool] = False
    #: What a plain number in ``loc`` means: ``mem``, guest-physical bytes, or ``io``, a port.
    space: ClassVar[str] = "mem"

    def __init__(self, ctx: VdevContext, options: Any) -> None:
        self.ctx = ctx
        self.options = options

    @classmethod
    def for_options(cls, options: Any) -> type[Vdev]:
        """The class whose declarations hold for these options: this one, or a subclass made of it.

        For a vdev whose options say how large its registers are or whether it has an interrupt. Opens
        nothing; the same options give the same declarations.
        """
        return cls

    @classmethod
    def claims(cls, options: Any) -> tuple[str, ...]:
        """Things of the host that only one vdev of a VM can have, by the names people know.

        ``("standard input", "standard output")`` for a console on the terminal. Two vdevs that
        claim the same thing are an error of the VM file; called before anything is created.
        """
        return ()

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """Value of ``size`` bytes at ``offset`` of the window; default all ones."""
        return (1 << (8 * size)) - 1

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """The guest wrote ``value``, ``size`` bytes at ``offset`` of the window; default ignored."""

    def describe_fdt(self, node: FdtNode) -> None:
        """Add properties to the vdev's node; ``compatible``, ``reg`` and ``interrupts`` are set.

        Called for a vdev with ``fdt_compatible``, on the main thread, before the start.
        """

    def on_configured(self) -> None:
        """Open host resources. Raise HostError to refuse the start with a clear message."""

    def on_starting(self) -> None:
        """Last chance to refuse, just before the first guest instruction."""

    def on_reset(self) -> None:
        """Back to the fresh state. Idempotent; guest memory and interrupts unused on return."""

    def on_button(self) -> bool:
        """The power button was pressed. True when the guest will be told."""
        return False

    def on_terminate(self, end: GuestEnd) -> None:
        """Release everything. Idempotent and bounded; also called when the start failed half-way."""

    def status(self) -> Mapping[str, object]:
        """Counters and states as JSON-able values; cheap, any thread."""
        return {}
