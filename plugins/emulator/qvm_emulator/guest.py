"""One emulated guest: the vCPU thread, the alarm thread, its interrupt controller and timers.

Threads. The vCPU thread runs the guest, every register handler, and sleeps in WFI. The alarm thread
watches the timers while the guest runs. Any other thread may drive an interrupt line, ask for the
status or stop the guest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

from qvm_emulator.cpu import Cpu, Window, Wiring
from qvm_emulator.gicv2 import GicV2
from qvm_emulator.gicv2m import GicV2m
from qvm_emulator.psci import Psci
from qvm_emulator.timer import NEVER, PHYSICAL_PPI, VIRTUAL_PPI, TimerChannel, now_ns
from qvmcore.api import CpuEntry, EngineError, GuestConfig, GuestEnd, IntrSpec, IrqLine, Reason

log = logging.getLogger(__name__)

#: How often a request that the guest has not acknowledged is repeated (see Cpu.set_irq), in ns.
_REPEAT_NS = 1_000_000
#: How often a stop is repeated until the vCPU thread has seen it, in seconds.
_KICK_INTERVAL = 0.002


class Wakeup:
    """A wake-up for one waiting thread: cheaper than a Condition, and never lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the waiter, or make its next wait return at once; any thread."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # already set

    def wait(self, deadline: int) -> None:
        """Until set, or until ``deadline`` (ns of the monotonic clock; NEVER for no limit)."""
        if deadline >= NEVER:
            self._lock.acquire()
            return
        left = deadline - now_ns()
        if left > 0:
            self._lock.acquire(timeout=left / 1e9)
        else:
            self._lock.acquire(blocking=False)


class GicLine:
    """An input of the interrupt controller; any thread."""

    def __init__(self, gic: GicV2, intid: int) -> None:
        self._gic = gic
        self._intid = intid

    def pulse(self) -> None:
        """Make the interrupt pending once."""
        self._gic.pulse(self._intid)

    def set(self, level: bool) -> None:
        """Drive the line."""
        self._gic.set_line(self._intid, level)


class EmulatedGuest:
    """Implements the core's Guest protocol."""

    #: Every access of an emulated CPU comes through Python.
    fast_doorbells = False

    def __init__(self, config: GuestConfig, cpu_class: type[Cpu]) -> None:
        self._config = config
        if len(config.controllers) != 1 or config.controllers[0].kind != "gicv2":
            kinds = ", ".join(c.kind for c in config.controllers) or "none"
            raise EngineError(f"the emulated engine needs one gicv2 interrupt controller, got {kinds}")
        self._controller = config.controllers[0]
        if len(self._controller.windows) != 2:
            raise EngineError("a gicv2 has two windows: the distributor and the CPU interface")
        self._gic = GicV2(max(self._controller.lines.stop, 64))
        self._frame = _msi_frame(config, self._gic)
        self._alarm = Wakeup()
        self._alarm_until = 0  # when the alarm thread wakes by itself; 0 while it is awake
        self._wake = Wakeup()
        self._parked = False
        self._ending = False
        self._pausing = False
        self._still = threading.Event()
        self._go = threading.Event()
        self._end_lock = threading.Lock()
        self._ended = False
        self._halts = 0
        self._vcpu = 0  # the vCPU thread
        self._threads: tuple[threading.Thread, ...] = ()
        self._timers = tuple(
            TimerChannel(partial(self._gic.set_line, ppi), self._timer_moved)
            for ppi in (VIRTUAL_PPI, PHYSICAL_PPI)
        )
        self._psci = Psci(self._end)
        self._cpu = cpu_class(self._wiring())
        self._gic.output = self._irq_changed

    # ---- the Guest protocol --------------------------------------------------------------------

    def irq_line(self, intr: IntrSpec) -> IrqLine:
        """A line of the controller. Raises EngineError for one it does not have."""
        if intr.controller != self._controller.name or not 16 <= intr.number < self._gic.lines:
            raise EngineError(
                f"no interrupt {intr}: the controller is {self._controller.name}, "
                f"lines {self._controller.lines.start} to {self._controller.lines.stop - 1}"
            )
        return GicLine(self._gic, intr.number)

    def signal_msi(self, address: int, data: int) -> None:
        """A device's message: it raises a line when it hits the frame's doorbell; any thread."""
        if self._frame is not None:
            self._frame.message(address, data)

    def listen(self, fd: int, address: int, data: int) -> None:
        """Nothing is faster here than :meth:`signal_msi`: no kernel has a part in this guest."""

    def listen_level(self, intr: IntrSpec, fd: int, resample: int) -> None:
        """Likewise."""

    def start(self, entry: CpuEntry) -> None:
        """Start the vCPU at ``entry`` and return."""
        if self._threads:
            raise EngineError("the guest was started already")
        self._cpu.enter(entry)
        self._threads = (
            threading.Thread(target=self._run, name="qvm-vcpu0", daemon=True),
            threading.Thread(target=self._watch, name="qvm-timer", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float) -> bool:
        """Stop the vCPU between two instructions; idempotent. False when it did not stop in time."""
        self._ending = True
        self.resume()
        deadline = time.monotonic() + timeout
        vcpu = self._threads[0] if self._threads else None
        while True:
            self._wake.set()
            self._alarm.set()
            if vcpu is None or not vcpu.is_alive():
                return True
            # Repeated: a kick that arrives between two runs has no effect.
            self._cpu.kick()
            if vcpu is threading.current_thread():
                return True  # called from a register handler: it stops when the handler returns
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            vcpu.join(min(left, _KICK_INTERVAL))

    def kick(self) -> None:
        """Have the vCPU leave the emulated code and come back; any thread. For tests."""
        self._cpu.kick()

    def pause(self, timeout: float) -> bool:
        """Hold the vCPU between two instructions; False when it did not come to rest in time."""
        if self._pausing and self._still.is_set():
            return True
        vcpu = self._threads[0] if self._threads else None
        self._go.clear()
        self._still.clear()
        self._pausing = True
        deadline = time.monotonic() + timeout
        while vcpu is not None and vcpu.is_alive() and not self._still.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                self.resume()
                return False
            self._wake.set()
            self._cpu.kick()  # repeated, as in stop()
            self._still.wait(min(left, _KICK_INTERVAL))
        return True

    def resume(self) -> None:
        """Let the vCPU run again."""
        self._pausing = False
        self._go.set()

    def registers(self) -> Sequence[Mapping[str, int]]:
        """The registers of the one CPU; meaningful when paused or stopped."""
        return (self._cpu.registers(),)

    def status(self) -> Mapping[str, object]:
        """Counters; cheap, any thread."""
        return {
            "mode": self._cpu.mode,
            "running": bool(self._threads) and self._threads[0].is_alive(),
            "halted": self._parked,
            "halts": self._halts,
            "interrupts": self._gic.delivered,
            "hypercalls": self._cpu.hypercalls,
        }

    def close(self) -> None:
        """Free the emulated CPU, unless it refuses to stop. Idempotent."""
        if self.stop(1.0):
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(1.0)
            self._cpu.close()

    # ---- the vCPU thread -----------------------------------------------------------------------

    def _run(self) -> None:
        cpu = self._cpu
        self._vcpu = threading.get_ident()
        try:
            while not self._ending:
                while self._pausing:
                    self._still.set()
                    self._go.wait()
                if cpu.run() and not self._ending:
                    self._sleep()
        except EngineError as error:
            self._end(GuestEnd(Reason.GUEST_CRASH, str(error)))
        except BaseException as error:
            self._fail(error)

    def _sleep(self) -> None:
        """WFI: sleep until an interrupt is deliverable, or a timer makes one so."""
        gic, timers = self._gic, self._timers
        self._halts += 1
        self._parked = True
        limit = now_ns() + self._cpu.sleep_limit
        # To leave without an interrupt is allowed: the guest looks at its condition again.
        while not gic.asserted and not self._ending and not self._pausing:
            self._wake.wait(min(limit, *(timer.deadline for timer in timers)))
            now = now_ns()
            for timer in timers:
                timer.expire(now)
            if now >= limit:
                break
        self._parked = False
        self._timer_moved()
        if gic.asserted:
            self._cpu.set_irq(True)  # on this thread, between two runs: this one cannot be lost

    # ---- interrupts and timers: any thread -------------------------------------------------------

    def _irq_changed(self, level: bool) -> None:
        self._cpu.set_irq(level)
        # The vCPU thread itself neither sleeps now nor misses the request.
        if level and threading.get_ident() != self._vcpu:
            self._wake.set()
            self._alarm_by(now_ns() + _REPEAT_NS)

    def _timer_moved(self) -> None:
        """A timer was reprogrammed, or the vCPU runs again: the alarm must not come too late."""
        if not self._parked:
            self._alarm_by(min(timer.deadline for timer in self._timers))

    def _alarm_by(self, deadline: int) -> None:
        # Only an earlier deadline wakes the thread; a later one it finds when it wakes anyway.
        if deadline < self._alarm_until:
            self._alarm.set()

    def _watch(self) -> None:
        """The alarm thread: fires timers while the guest runs, and repeats unanswered requests."""
        gic, timers = self._gic, self._timers
        while not self._ending:
            if not self._parked:
                now = now_ns()
                for timer in timers:
                    timer.expire(now)
                if gic.asserted:
                    self._cpu.set_irq(True)
            self._alarm_until = self._next_alarm()
            # Looked at again: what changed before the line above did not wake this thread. (A store to an
            # attribute is seen before the loads behind it, without a GIL too: it takes a lock there.)
            self._alarm.wait(min(self._alarm_until, self._next_alarm()))
            self._alarm_until = 0

    def _next_alarm(self) -> int:
        if self._parked:
            return NEVER  # the vCPU thread looks after itself
        until = min(timer.deadline for timer in self._timers)
        return min(until, now_ns() + _REPEAT_NS) if self._gic.asserted else until

    # ---- the end ---------------------------------------------------------------------------------

    def _end(self, end: GuestEnd) -> None:
        """Report the end once, and have the vCPU leave; any thread, also inside a handler."""
        with self._end_lock:
            first, self._ended = not self._ended and not self._ending, True
        self._ending = True
        self._cpu.kick()
        self._wake.set()
        self._alarm.set()
        if first:
            self._config.on_end(end)

    def _fail(self, error: BaseException) -> None:
        """An exception out of a handler or the engine: the guest cannot be trusted to go on."""
        log.error("the emulated engine failed", exc_info=error)
        self._end(GuestEnd(Reason.HOST_ERROR, f"engine failure: {type(error).__name__}: {error}"))

    def _wiring(self) -> Wiring:
        (dist, dist_size), (cpu, cpu_size) = self._controller.windows
        gic, frame = self._gic, self._frame
        windows = [
            Window(dist, dist_size, gic.dist_read, gic.dist_write),
            Window(cpu, cpu_size, gic.cpu_read, gic.cpu_write),
        ]
        if frame is not None:
            windows.append(Window(frame.base, frame.size, frame.read, frame.write))
        return Wiring(
            memory=self._config.memory,
            windows=tuple(windows),
            bus_read=self._config.bus.read,
            bus_write=self._config.bus.write,
            hypercall=self._psci.call,
            virtual_timer=self._timers[0],
            physical_timer=self._timers[1],
            failed=self._fail,
        )


def _msi_frame(config: GuestConfig, gic: GicV2) -> GicV2m | None:
    """The MSI frame of a machine with PCI. Raises EngineError for one that cannot be."""
    msi = config.msi
    if msi is None:
        return None
    if msi.kind != "gicv2m":
        raise EngineError(f"the emulated engine has MSI frames of the kind gicv2m, not {msi.kind}")
    if not 32 <= msi.lines.start < msi.lines.stop <= gic.lines:
        raise EngineError(f"the MSI frame's lines {msi.lines} are not shared interrupts of the controller")
    return GicV2m(gic, msi.base, msi.size, msi.lines)
