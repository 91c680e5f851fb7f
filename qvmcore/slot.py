"""The framework's own record of one vdev instance (floor 8).

The slot is the one place where a fault of a vdev is caught: an exception that leaves a register
handler, a worker callback or a life-cycle method is logged once with its traceback, the device
fails (reads give all ones, writes are dropped, its interrupts fall) and the VM lives, or ends in
order with exit code 6 when ``on_fault = "shutdown"``.

A plain vdev is serial: its register handlers and its worker callbacks hold the slot lock. A
VirtioVdev is not: its transport has a lock of its own, so that a long request does not stop the
vCPU at a register.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from qvmcore.bus import all_ones
from qvmcore.errors import GuestError, PluginError, QvmError, VdevHung
from qvmcore.events import Worker, stack_of
from qvmcore.irq import IrqLine, NullIrq
from qvmcore.memory import GuestMemory
from qvmcore.termination import Phase, TerminationCallback, TerminationPlan
from qvmcore.types import GuestEnd, IntrSpec, MmioHandler, Reason, VdevSpec
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev

if TYPE_CHECKING:
    from collections.abc import MutableSequence

#: Seconds a vCPU waits for a worker callback of the same vdev before the device counts as hung.
LOCK_PATIENCE = 2.0
#: Seconds a register handler may run before it is interrupted.
HANDLER_PATIENCE = 5.0
#: Seconds on_terminate and the stop of a worker may take.
END_DEADLINE = 2.0


#: What the exit codes below 32 that a vdev may choose mean.
_VDEV_ENDS = {0: Reason.GUEST_SHUTDOWN, 3: Reason.POWER_CUT, 6: Reason.VDEV_FATAL}


class VdevSlot:
    """One vdev of a machine: its spec, object, bound lines, worker and fault state.

    ``end(GuestEnd)`` and ``button()`` are the machine's entrances for a vdev's requests; both may
    be called from any thread. ``poll`` is the worker's, in seconds. The slot is also the vdev's
    :class:`~qvmcore.vdev.VdevContext`.
    """

    def __init__(
        self,
        spec: VdevSpec,
        cls: type[Vdev],
        plan: TerminationPlan,
        end: Callable[[GuestEnd], None],
        button: Callable[[], None],
        machine: str = "",
        poll: float = 0.0,
    ) -> None:
        self.spec = spec
        self.cls = cls
        self.name = spec.name
        self.machine = machine
        self.base_dir = spec.base_dir.absolute()
        self.memory = GuestMemory()
        self.log = logging.LoggerAdapter(logging.getLogger(f"qvm.vdev.{spec.type}"), {"vdev": spec.name})
        self.faulted = ""
        self.guest_errors = 0
        self.lines: MutableSequence[IrqLine] = [NullIrq() for _ in range(cls.irqs)]
        #: Where window ``n`` is; whoever binds the windows of a PCI function replaces it.
        self.place_of: Callable[[int], int | None] = self._fixed_place
        self._plan = plan
        self._poll = poll
        self._end = end
        self._button = button
        self._lock = threading.RLock()
        self._fault_lock = threading.Lock()
        self._threads_allowed = False
        self._worker: Worker | None = None
        #: The register handler that runs: since when, on which thread. Written by such threads only.
        self._busy: tuple[float, int] | None = None
        #: The one that was interrupted last, and when.
        self._interrupted: tuple[tuple[float, int] | None, float] = None, 0.0
        self._vdev: Vdev | None = None

    @property
    def vdev(self) -> Vdev:
        """The vdev object."""
        if self._vdev is None:
            raise RuntimeError(f"{self.name}: not created yet")
        return self._vdev

    def adopt(self, vdev: Vdev) -> None:
        """Take the created object. Raises PluginError when a hook gave something else."""
        if not isinstance(vdev, Vdev):
            raise PluginError(f"{self.spec.where}: qvm_create_vdev gave {vdev!r}, not a Vdev")
        self._vdev = vdev

    # -- VdevContext ---------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        """See VdevContext. Raises RuntimeError before ``on_configured``: no thread until then."""
        if not self._threads_allowed:
            raise RuntimeError("ctx.worker is allowed from on_configured() on")
        if self._worker is None:
            serial = None if issubclass(self.cls, VirtioVdev) else self._lock
            self._worker = Worker(f"vdev-{self.name}", self.fault, serial, self._poll)
        return self._worker

    def irq(self, index: int = 0) -> IrqLine:
        """See VdevContext. Raises IndexError for a line the class does not declare."""
        return self.lines[index]

    @property
    def intr(self) -> IntrSpec | None:
        """See VdevContext."""
        return self.spec.intr

    def address(self, window: int = 0) -> int | None:
        """See VdevContext."""
        return self.place_of(window)

    def _fixed_place(self, window: int) -> int | None:
        """Windows of a ``loc`` follow each other."""
        if self.spec.loc is None:
            return None
        return self.spec.loc + sum(each.size for each in self.cls.windows[:window])

    def on_terminate(self, run: Callable[[GuestEnd], None], *, phase: Phase, deadline: float = 1.0) -> None:
        """See VdevContext."""
        self._plan.add(TerminationCallback(self.name, phase, run, deadline))

    def request_shutdown(self, message: str, *, code: int = 6) -> None:
        """See VdevContext. Raises ValueError for a code that is not a vdev's to choose."""
        reason = _VDEV_ENDS.get(code, Reason.VDEV_FATAL)
        if code not in _VDEV_ENDS and not 32 <= code <= 63:
            raise ValueError(f"exit code {code}: a vdev may choose 0, 3, 6, or 32 to 63")
        self._end(GuestEnd(reason, f"{self.name}: {message}", code))

    def request_reset(self, message: str) -> None:
        """See VdevContext."""
        self._end(GuestEnd(Reason.GUEST_RESET, f"{self.name}: {message}"))

    def press_power_button(self) -> None:
        """See VdevContext."""
        self._button()

    def fault(self, error: BaseException) -> None:
        """See VdevContext. The first fault is logged and decides; later ones change nothing.

        A GuestError is the guest's mistake, not the vdev's: it is only counted and logged, ever
        more rarely, so that a hostile guest cannot fill the log.
        """
        if isinstance(error, GuestError):
            with self._fault_lock:
                self.guest_errors += 1
                count = self.guest_errors
            if count & (count - 1) == 0:
                self.log.warning("%s: guest error %d: %s", self.spec.where, count, error)
            return
        with self._fault_lock:
            if self.faulted:
                return
            self.faulted = f"{type(error).__name__}: {error}"
        detail = (
            str(error) if isinstance(error, QvmError) else "".join(traceback.format_exception(error)).strip()
        )
        self.log.error("%s failed and is isolated: %s", self.spec.where, detail)
        for line in self.lines:
            line.set(False)
        if self._worker is not None:
            self._worker.stop(0)
        if self.spec.on_fault == "shutdown":
            self.request_shutdown(f"failed: {self.faulted}")

    # -- framework side ------------------------------------------------------------------------

    def configure(self, memory: GuestMemory) -> None:
        """Give the vdev its memory, plan its end, and let it open its host resources."""
        self.memory = memory
        self._threads_allowed = True
        self._plan.add(
            TerminationCallback(self.name, Phase.STOP_WORKERS, self._stop_worker, END_DEADLINE + 0.5)
        )
        self._plan.add(TerminationCallback(self.name, Phase.RELEASE, self.vdev.on_terminate, END_DEADLINE))
        self.vdev.on_configured()

    def serial(self) -> AbstractContextManager[object]:
        """Held around register handlers and worker callbacks of a plain vdev; nothing for a virtio one."""
        return contextlib.nullcontext() if issubclass(self.cls, VirtioVdev) else self._lock

    def guard(self, handler: MmioHandler) -> MmioHandler:
        """The handler behind the fault isolation, and behind the slot lock for a serial vdev."""
        read, write = handler.read, handler.write
        serial = not isinstance(self.vdev, VirtioVdev)
        acquire, release = self._lock.acquire, self._lock.release
        now, ident = time.monotonic, threading.get_ident

        def guarded_read(offset: int, size: int) -> int:
            if self.faulted:
                return all_ones(size)
            if serial and not acquire(timeout=LOCK_PATIENCE):
                self.fault(VdevHung("its worker holds the device"))
                return all_ones(size)
            self._busy = (now(), ident())
            try:
                return read(offset, size) & ((1 << (8 * size)) - 1)
            except Exception as error:
                self._busy = None  # it is out of the handler: what follows is not to be interrupted
                self.fault(error)
                return all_ones(size)
            finally:
                self._busy = None
                if serial:
                    release()

        def guarded_write(offset: int, size: int, value: int) -> None:
            if self.faulted:
                return
            if serial and not acquire(timeout=LOCK_PATIENCE):
                self.fault(VdevHung("its worker holds the device"))
                return
            self._busy = (now(), ident())
            try:
                write(offset, size, value)
            except Exception as error:
                self._busy = None  # likewise
                self.fault(error)
            finally:
                self._busy = None
                if serial:
                    release()

        return handler._replace(read=guarded_read, write=guarded_write)

    def interrupt_if_hung(self) -> None:
        """Raise VdevHung inside a register handler that has run for too long; called by the machine.

        Only Python code can be interrupted; a handler blocked in a system call keeps its vCPU. One that goes
        on all the same is interrupted again.
        """
        busy = self._busy
        if busy is None:
            return
        last, when = self._interrupted
        if time.monotonic() - (when if last is busy else busy[0]) < HANDLER_PATIENCE:
            return
        self.log.error(
            "%s: a register handler runs for %.0f s; interrupting it at\n%s",
            self.spec.where,
            HANDLER_PATIENCE,
            stack_of(busy[1]),
        )
        # Outside of the handler it would hit the vCPU itself; and it may have come to its end by now.
        if self._busy is busy:
            self._interrupted = busy, time.monotonic()
            _raise_in(busy[1], VdevHung)
            if self._busy is not busy:
                _raise_in(busy[1], None)

    def _stop_worker(self, _end: GuestEnd) -> None:
        worker = self._worker
        if worker is None or worker.stop(END_DEADLINE):
            return
        raise TimeoutError(
            f"{worker.name} did not stop within {END_DEADLINE} s; it was at\n{stack_of(worker.ident)}"
        )


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise in another thread when it runs Python code next; None takes back what was not raised yet."""
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
