"""Fakes of what surrounds a vdev, and :func:`plug`, which puts one on a bus without an engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar, cast

from qvmcore.bus import AddressSpace, all_ones
from qvmcore.errors import ConfigError, Diagnostic, GuestError
from qvmcore.events import Worker, stack_of
from qvmcore.irq import IrqLine
from qvmcore.memory import GuestMemory
from qvmcore.options import convert_options
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.vdev import PciVdev, function_of, interrupts_of
from qvmcore.termination import Phase, StepResult, TerminationCallback, TerminationPlan
from qvmcore.testing.driver import GuestRam, MmioDriver, VirtioDriver
from qvmcore.testing.fake_pci import FakePciBus
from qvmcore.testing.pci_driver import PciDevice, PciDriver
from qvmcore.types import GuestEnd, IntrSpec, MemorySpec, MmioHandler, Reason, Window
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.mmio import MmioTransport
from qvmcore.virtio.pci import STRUCTURES_BAR, PciTransport

#: Where :func:`plug` puts the first window and the memory, guest-physical.
BASE = 0x1C0D_0000
RAM = (MemorySpec(0x8000_0000, 4 << 20),)

#: What a virtio vdev may hang on.
TRANSPORTS = ("mmio", "pci")

V = TypeVar("V", bound=Vdev)

_transport: ContextVar[str] = ContextVar("transport", default="mmio")


@contextmanager
def default_transport(name: str) -> Iterator[None]:
    """What :func:`plug` puts a virtio vdev on inside the ``with`` block: ``mmio`` or ``pci``."""
    token = _transport.set(name)
    try:
        yield
    finally:
        _transport.reset(token)


class FakeIrq:
    """An interrupt line that counts: ``pulses``, ``rises`` of the level, and the ``level`` now."""

    def __init__(self) -> None:
        self.pulses = 0
        self.rises = 0
        self.level = False
        self._changed = threading.Condition()

    def pulse(self) -> None:
        """Count one edge."""
        with self._changed:
            self.pulses += 1
            self._changed.notify_all()

    def set(self, level: bool) -> None:
        """Drive the level; a rise is counted."""
        with self._changed:
            self.rises += level and not self.level
            self.level = level
            self._changed.notify_all()

    @property
    def count(self) -> int:
        """Every signal so far, edges and rises."""
        return self.pulses + self.rises

    def wait(self, count: int = 1, timeout: float = 5.0) -> bool:
        """Wait until ``count`` signals were seen in all; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.pulses + self.rises >= count, timeout)


class FakeContext:
    """A :class:`~qvmcore.vdev.VdevContext` that records: ``faults``, ``shutdowns``, ``button_presses``.

    ``plan`` holds the steps given to ``on_terminate``. Before ``threads_allowed`` is set, as the
    framework does for ``on_configured``, the worker is refused.
    """

    def __init__(self, name: str, memory: GuestMemory, irqs: int, base_dir: Path = Path()) -> None:
        self.name = name
        self.machine = "test"
        self.memory = memory
        self.base_dir = base_dir
        self.log = logging.LoggerAdapter(logging.getLogger("qvm.vdev.test"), {"vdev": name})
        self.irqs = tuple(FakeIrq() for _ in range(irqs))
        #: The lines of a PciVdev, which end in ``irqs[0]``; empty for any other vdev.
        self.pci_lines: Sequence[IrqLine] = ()
        self.faults: list[BaseException] = []
        self.shutdowns: list[tuple[str, int]] = []
        self.resets: list[str] = []
        self.button_presses = 0
        self.plan = TerminationPlan()
        self.threads_allowed = False
        self.intr: IntrSpec | None = None
        #: Where the windows are, in their order.
        self.places: list[int] = []
        #: What they are BARs of, on PCI.
        self.function: PciFunction | None = None
        #: Held around register accesses and worker callbacks of a plain vdev.
        self.serial: AbstractContextManager[object] = nullcontext()
        self._worker: Worker | None = None

    @property
    def worker(self) -> Worker:
        """The vdev's thread; RuntimeError before ``on_configured``."""
        if not self.threads_allowed:
            raise RuntimeError("ctx.worker is allowed from on_configured() on")
        if self._worker is None:
            self._worker = Worker(f"vdev-{self.name}", self.fault, self.serial)
        return self._worker

    @property
    def worker_alive(self) -> bool:
        """Whether the vdev's thread runs."""
        return self._worker is not None and self._worker.alive

    def irq(self, index: int = 0) -> IrqLine:
        """The fake line; IndexError for one the class does not declare."""
        return self.pci_lines[index] if self.pci_lines else self.irqs[index]

    def address(self, window: int = 0) -> int | None:
        """Where :func:`plug`, or the driver that moved its BAR, put a window."""
        if self.function is not None:
            return self.function.bar_address(self.function.bars[window].number)
        return self.places[window] if window < len(self.places) else None

    def on_terminate(self, run: Callable[[GuestEnd], None], *, phase: Phase, deadline: float = 1.0) -> None:
        """Recorded in ``plan``."""
        self.plan.add(TerminationCallback(self.name, phase, run, deadline))

    def request_shutdown(self, message: str, *, code: int = 6) -> None:
        """Recorded in ``shutdowns``."""
        self.shutdowns.append((message, code))

    def request_reset(self, message: str) -> None:
        """Recorded in ``resets``."""
        self.resets.append(message)

    def press_power_button(self) -> None:
        """Counted in ``button_presses``."""
        self.button_presses += 1

    def fault(self, error: BaseException) -> None:
        """Recorded in ``faults``; the guest's own mistakes are no fault of the device."""
        if not isinstance(error, GuestError):
            self.faults.append(error)

    def stop_worker(self, timeout: float = 2.0) -> bool:
        """End the vdev's thread as the framework does; False when it does not end."""
        return self._worker is None or self._worker.stop(timeout)

    def settle(self, timeout: float) -> None:
        """Wait until the worker has done everything asked of it before. AssertionError when late."""
        worker = self._worker
        if worker is None or not worker.alive or worker.ident == threading.get_ident():
            return
        # Once for what was signalled before, once for what that work signalled in turn.
        for _ in range(2):
            passed = threading.Event()
            worker.call(passed.set)
            if not passed.wait(timeout) and worker.alive:
                stack = stack_of(worker.ident)
                raise AssertionError(f"{worker.name} is still busy after {timeout:g} s, at\n{stack}")


class Plugged(Generic[V]):
    """A vdev on a real AddressSpace and GuestMemory, configured and started. A context manager.

    ``base`` is the address of its first window; further windows follow it. For a virtio vdev on PCI
    that is the BAR of the structures, ``pci`` its bus and ``device`` its enumerated function.
    """

    def __init__(self, vdev: V, ctx: FakeContext, bus: AddressSpace, base: int) -> None:
        self.vdev = vdev
        self.ctx = ctx
        self.bus = bus
        self.base = base
        self.memory = ctx.memory
        self.transport: MmioTransport | PciTransport | None = None
        self.pci: FakePciBus | None = None
        self.device: PciDevice | None = None
        self._ended = False

    @property
    def irq(self) -> FakeIrq:
        """The first interrupt line."""
        return self.ctx.irqs[0]

    def read(self, offset: int, size: int = 4) -> int:
        """A guest load at ``offset`` from the first window."""
        return self.bus.read(self.base + offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """A guest store at ``offset`` from the first window."""
        self.bus.write(self.base + offset, size, value)

    @property
    def windows(self) -> Sequence[Window]:
        """What lies at ``base``, one behind the other."""
        if self.pci is None:
            return self.vdev.windows
        return tuple(bar.window for bar in self.pci.function.bars[:1])

    def driver(self) -> VirtioDriver:
        """A guest's driver for this virtio device, which has not begun."""
        ram = GuestRam(self.memory)
        if self.device is not None:
            return PciDriver(self.bus, self.device, ram)
        return MmioDriver(self.bus, self.base, ram)

    def settle(self, timeout: float = 5.0) -> None:
        """Wait until the worker is idle. AssertionError, with its stack, when it does not come."""
        self.ctx.settle(timeout)

    def terminate(self, end: GuestEnd | None = None) -> tuple[StepResult, ...]:
        """End the VM as the framework does: the plan, the worker, ``on_terminate``. Idempotent."""
        if not self._ended:
            self._ended = True
            self.ctx.plan.add(TerminationCallback("worker", Phase.STOP_WORKERS, self._stop_worker, 3.0))
            self.ctx.plan.add(TerminationCallback("vdev", Phase.RELEASE, self.vdev.on_terminate, 3.0))
        return self.ctx.plan.run(end or GuestEnd(Reason.GUEST_SHUTDOWN, "test"))

    def close(self) -> None:
        """Terminate and unmap the memory."""
        self.terminate()
        self.memory.close()

    def __enter__(self) -> Plugged[V]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stop_worker(self, _end: GuestEnd) -> None:
        if not self.ctx.stop_worker():
            raise TimeoutError(f"the worker of {self.ctx.name} did not stop")


def plug(
    vdev_class: type[V],
    table: Mapping[str, object] | None = None,
    /,
    ram: Sequence[MemorySpec] = RAM,
    base: int = BASE,
    base_dir: Path = Path(),
    start: bool = True,
    transport: str | None = None,
    fast_doorbells: bool = False,
    **options: object,
) -> Plugged[V]:
    """Create a vdev from TOML-like options, configure it, put it on a bus, and start it.

    Options are keywords, or a mapping where their names clash with those of this function.
    Raises ConfigError for wrong options and whatever ``on_configured`` raises, after the device was
    terminated. With ``start=False`` the vdev is configured and bound but ``on_starting`` was not
    called. Faults are recorded in ``.ctx.faults`` and, as in a machine, reads then give all ones.
    ``transport`` is what a virtio vdev hangs on, ``mmio`` or ``pci``; by default what
    :func:`default_transport` says, else ``mmio``. ``fast_doorbells`` is what an engine with ioeventfds
    has: the transport counts on notifications that are no calls.
    """
    converted, problems = convert_options(vdev_class.Options, {**(table or {}), **options}, base_dir)
    if problems:
        kind = vdev_class.vdev_type
        raise ConfigError(Diagnostic("<test>", 0, kind, item.message, item.hint) for item in problems)
    vdev_class = cast(type[V], vdev_class.for_options(converted))
    ctx = FakeContext(f"{vdev_class.vdev_type}_test", GuestMemory.allocate(ram), vdev_class.irqs, base_dir)
    if not issubclass(vdev_class, VirtioVdev):
        ctx.serial = threading.RLock()
    vdev = vdev_class(ctx, converted)
    interrupts = interrupts_of(vdev_class) if issubclass(vdev_class, PciVdev) else PciInterrupts()
    if isinstance(vdev, PciVdev):
        ctx.pci_lines = [interrupts.line(index) for index in range(vdev_class.irqs)]
    bus = AddressSpace()
    plugged = Plugged(vdev, ctx, bus, base)
    ctx.threads_allowed = True
    try:
        vdev.on_configured()
        if isinstance(vdev, VirtioVdev) and (transport or _transport.get()) == "pci":
            over_pci = plugged.transport = PciTransport(vdev, fast_doorbells=fast_doorbells)
            plugged.base = _hang(plugged, over_pci.function, STRUCTURES_BAR)
        elif isinstance(vdev, PciVdev):
            plugged.base = _hang(plugged, function_of(vdev, interrupts), 0)
        else:
            _place(plugged, fast_doorbells)
        bus.freeze()
        if start:
            vdev.on_starting()
    except BaseException:
        plugged.close()
        raise
    return plugged


def _hang(plugged: Plugged[V], function: PciFunction, first: int) -> int:
    """Put a function on a PCI bus and enumerate it, as the core's binding and firmware do.

    Where BAR ``first`` is now; the aperture when there is no such BAR.
    """
    ctx = plugged.ctx
    ctx.function = function
    irq = ctx.irqs[0] if ctx.irqs else FakeIrq()
    plugged.pci = FakePciBus(function, plugged.bus, irq, ctx.name, lambda handler: _isolated(handler, ctx))
    plugged.device = PciDevice(plugged.pci, plugged.base)
    plugged.device.enumerate()
    return plugged.device.bars.get(first, (plugged.base, 0))[0]


def _place(plugged: Plugged[V], fast_doorbells: bool) -> None:
    """Bind every window as the core's default binding does."""
    vdev, address = plugged.vdev, plugged.base
    for index, window in enumerate(vdev.windows):
        if isinstance(vdev, VirtioVdev):
            plugged.transport = MmioTransport(vdev, fast_doorbells=fast_doorbells)
            handler = plugged.transport.handler()
        else:
            handler = _own_handler(vdev, index)
        plugged.ctx.places.append(address)
        plugged.bus.insert(address, window, _isolated(handler, plugged.ctx), plugged.ctx.name)
        address += window.size


def _own_handler(vdev: Vdev, index: int) -> MmioHandler:
    return MmioHandler(
        lambda offset, size: vdev.mmio_read(index, offset, size),
        lambda offset, size, value: vdev.mmio_write(index, offset, size, value),
    )


def _isolated(handler: MmioHandler, ctx: FakeContext) -> MmioHandler:
    """The handler under the vdev's lock; what it raises becomes a recorded fault."""

    def read(offset: int, size: int) -> int:
        if ctx.faults:
            return all_ones(size)
        try:
            with ctx.serial:
                value = handler.read(offset, size)
            if not 0 <= value <= all_ones(size):
                raise ValueError(f"read of {size} bytes at {offset:#x} gave {value:#x}")
            return value
        except Exception as error:
            # As in the framework's slot: whatever leaves a vdev is its fault and ends there.
            ctx.fault(error)
            return all_ones(size)

    def write(offset: int, size: int, value: int) -> None:
        if ctx.faults:
            return
        try:
            with ctx.serial:
                handler.write(offset, size, value)
        except Exception as error:
            ctx.fault(error)

    return handler._replace(read=read, write=write)
