"""A machine from spec to exit code (floor 9): build, configure, freeze, run, terminate.

Single-threaded until ``on_configured``. Afterwards the main thread only waits: for the guest's
end, a vdev's request, a signal or the power button. All of these are put into one queue, so the
end is decided in one place and the termination plan runs once, on the main thread.
"""

from __future__ import annotations

import logging
import queue
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvmcore import boards
from qvmcore.acpi import AcpiTables
from qvmcore.bind import DefaultBindings, bind_irqs, bind_windows
from qvmcore.bind_pci import PciBinding
from qvmcore.boards import Board, DescribedVdev
from qvmcore.bus import AddressSpace
from qvmcore.button import press_button
from qvmcore.choose import choose_engine
from qvmcore.control import ControlServer
from qvmcore.dump import write_dump
from qvmcore.engine import Engine, Guest, GuestConfig
from qvmcore.errors import HostError
from qvmcore.inquiry import Inquiry, describe, status_lines
from qvmcore.memory import GuestMemory
from qvmcore.plugins import PluginHost
from qvmcore.signals import SignalEvents, StartGivenUp
from qvmcore.slot import VdevSlot
from qvmcore.termination import Phase, StepResult, TerminationPlan
from qvmcore.types import GuestEnd, MachineSpec, Reason

log = logging.getLogger("qvm")

#: Seconds the vCPUs get to stop before the plan goes on without them.
VCPU_STOP_TIMEOUT = 2.0
#: Seconds after which a thread that computes lets another one run.
SWITCH_INTERVAL = 0.0005
#: Seconds between two looks for hung register handlers.
WATCH_PERIOD = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: what the guest did, what became of each termination step, the exit code."""

    end: GuestEnd
    steps: tuple[StepResult, ...]
    vcpus_stopped: bool

    @property
    def code(self) -> int:
        """Exit code of the process: 8 when a physical device was not proven quiet, whatever the end was."""
        return self.end.code if self.quiet else Reason.NOT_QUIET.exit_code

    @property
    def quiet(self) -> bool:
        """Whether everybody who quiesces a physical device says that it is quiet."""
        return all(step.verdict == "ok" for step in self.steps if step.quiets)


class Machine:
    """One VM, from :meth:`build`. Use :meth:`fdt`, :meth:`acpi` or :meth:`run` once, main thread."""

    def __init__(self, spec: MachineSpec, host: PluginHost, board: Board) -> None:
        self.spec = spec
        self.board = board
        self.slots: Sequence[VdevSlot] = ()
        self.plan = TerminationPlan()
        self._host = host
        self._events: queue.SimpleQueue[GuestEnd | str] = queue.SimpleQueue()
        self._bindings = DefaultBindings()
        self._memory = GuestMemory()
        self._guest: Guest | None = None
        self._inquiry = Inquiry()
        self._engine_name = ""
        self._state = "starting"
        self._since = time.monotonic()
        #: Whether the guest was started; decides between exit codes 64 and 96.
        self.started = False

    @classmethod
    def build(cls, spec: MachineSpec, host: PluginHost) -> Machine:
        """Create the vdev objects of a checked spec; opens nothing and starts nothing."""
        machine = cls(spec, host, boards.get(spec.board))
        host.register(machine._bindings)
        slots = []
        for vdev_spec in spec.vdevs:
            vdev_class = host.vdev_class(vdev_spec.type).for_options(vdev_spec.options)
            slot = VdevSlot(
                vdev_spec, vdev_class, machine.plan, machine.end, machine.press_power_button, spec.name
            )
            slot.adopt(host.create_vdev(vdev_spec, vdev_class, slot))
            slots.append(slot)
        machine.slots = tuple(slots)
        return machine

    def fdt(self) -> bytes:
        """The device tree the guest would get, without a loaded initrd's addresses."""
        return self.board.build_fdt(self.spec, self._described())

    def acpi(self) -> AcpiTables:
        """The ACPI tables the guest would get."""
        return self.board.build_acpi(self.spec, self._described())

    def end(self, end: GuestEnd) -> None:
        """Ask for the end of the VM; the first one decides. Any thread."""
        self._events.put(end)

    def report(self, name: str = "") -> dict[str, Any]:
        """What SIGUSR1 logs and ``qvm status`` shows, as JSON-able values; within a second, any thread.

        ``name`` is that of the run directory. ``ram`` is in bytes, ``uptime`` in seconds.
        """
        # Before the start and during the end a vdev is half there: it is not asked.
        state = self._state
        alive = state not in ("starting", "ending")
        answers = self._inquiry.ask(self._guest if alive else None, self.slots if alive else ())
        return describe(self.spec, name, self._engine_name, state, time.monotonic() - self._since) | answers

    def press_power_button(self) -> None:
        """Press the power button, as SIGTERM does. Any thread."""
        self._events.put("button")

    def run(self) -> Outcome:
        """Run the whole life of the VM and end it in order, whatever happens.

        Raises QvmError when the VM could not be started; everything opened is released by then. A start that
        was given up by two signals is an Outcome: the power was cut.
        """
        # A busy worker may hold up a vCPU's register access for one interval: 5 ms is too long.
        sys.setswitchinterval(SWITCH_INTERVAL)
        with SignalEvents(self._events.put) as signals:
            engine = choose_engine(self._host, self.spec.engine, self.board.arch)
            self._engine_name = engine.name
            end = GuestEnd(Reason.HOST_ERROR, "not started")
            with ControlServer(self.spec.name, self.report):
                try:
                    with signals.starting():
                        self._start(engine)
                    self._state = "running"
                    end = self._wait()
                except StartGivenUp as request:
                    end = GuestEnd(Reason.POWER_CUT, str(request))
                finally:
                    # Also for KeyboardInterrupt, SystemExit and a failed start: nothing may be left.
                    self._state = "ending"
                    stopped, steps = self._terminate(end)
        return Outcome(end, steps, stopped)

    # -- start ---------------------------------------------------------------------------------

    def _start(self, engine: Engine) -> None:
        self._memory = memory = GuestMemory.allocate(self.spec.memory)
        bus = AddressSpace(self._unsupported)
        ports = AddressSpace(self._unsupported_port) if self.board.port_space else None
        pci = self.board.pci if self.spec.pci else None
        config = GuestConfig(
            self.board.arch,
            self.spec.cpus,
            memory,
            bus,
            self.board.controllers,
            self.end,
            pci.msi if pci is not None else None,
            ports,
        )
        guest = engine.create_guest(config)
        self._guest = guest
        self._bindings.fast_doorbells = guest.fast_doorbells
        functions = PciBinding(pci, self.slots, self._host, self._bindings) if pci is not None else None
        bind_irqs(self.slots, self._host, guest)
        if functions is not None:
            functions.bind_irqs(guest)
        for slot in self.slots:
            slot.configure(memory)
        for callback in self._host.termination_callbacks(self):
            self.plan.add(callback)
        if self.spec.require_quiesce:
            self._check_quiesce()
        bind_windows(self.slots, self._host, bus, ports)
        if functions is not None:
            functions.bind_functions(guest, bus, ports)
        bus.freeze()
        if ports is not None:
            ports.freeze()
        entry = self.board.load(self.spec, self._described(), memory)
        for slot in self.slots:
            slot.vdev.on_starting()
        self.started = True
        guest.start(entry)

    def _check_quiesce(self) -> None:
        """``[safety] require_quiesce``: each physical device has somebody who stops its DMA."""
        covered = {
            name for each in self.plan.callbacks if each.phase is Phase.STOP_DMA for name in each.quiets
        }
        bare = [slot.spec.where for slot in self.slots if slot.cls.physical and slot.name not in covered]
        if bare:
            raise HostError(
                f"[safety] require-quiesce: nobody quiesces {', '.join(bare)}",
                hint='add a [[vdev]] with type = "quiesce"',
            )

    def _described(self) -> list[DescribedVdev]:
        return [DescribedVdev(slot.spec, slot.vdev) for slot in self.slots]

    def _unsupported(self, address: int, size: int, value: int | None, what: str = "address") -> None:
        if self.spec.unsupported != "abort":
            return
        how = "read of" if value is None else f"write of {value:#x} to"
        self.end(GuestEnd(Reason.UNSUPPORTED_ACCESS, f"{size}-byte {how} unmapped {what} {address:#x}"))

    def _unsupported_port(self, port: int, size: int, value: int | None) -> None:
        self._unsupported(port, size, value, "I/O port")

    # -- run -----------------------------------------------------------------------------------

    def _wait(self) -> GuestEnd:
        deadline: float | None = None
        while True:
            timeout = (
                WATCH_PERIOD if deadline is None else max(0.0, min(WATCH_PERIOD, deadline - time.monotonic()))
            )
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                for slot in self.slots:
                    slot.interrupt_if_hung()
                if deadline is not None and time.monotonic() >= deadline:
                    return GuestEnd(
                        Reason.POWER_CUT,
                        f"the guest did not power off within {self.spec.shutdown_timeout:g} s",
                    )
                continue
            if isinstance(event, GuestEnd):
                return event
            if event == "SIGQUIT":
                return GuestEnd(Reason.SIGQUIT, "power cut by SIGQUIT")
            if event == "SIGUSR1":
                for line in status_lines(self.report()):
                    log.info("status: %s", line)
            elif event == "SIGUSR2":
                self._dump()
            elif deadline is not None:
                return GuestEnd(Reason.POWER_CUT, f"power cut by a second {event}")
            elif press_button(self.slots):
                log.info(
                    "%s: asked the guest to power off; cutting the power in %g s, or on a second request",
                    event,
                    self.spec.shutdown_timeout,
                )
                self._state = "powering off"
                deadline = time.monotonic() + self.spec.shutdown_timeout
            else:
                return GuestEnd(Reason.POWER_CUT, f"{event}: no vdev can tell the guest; power cut")

    def _dump(self) -> None:
        guest = self._guest
        assert guest is not None
        if not guest.pause(VCPU_STOP_TIMEOUT):
            log.error("SIGUSR2: a vCPU did not pause within %g s; no dump", VCPU_STOP_TIMEOUT)
            return
        try:
            self._write_dump(guest, "SIGUSR2", self.spec.dump_dir or Path.cwd())
        finally:
            guest.resume()

    def _write_dump(self, guest: Guest, why: str, folder: Path) -> None:
        try:
            path = write_dump(folder, self.spec.name, self.board.arch, self._memory, guest.registers())
            log.info("%s: guest dump in %s", why, path)
        except HostError as error:
            log.error("%s: %s", why, error)

    def _dump_crash(self, guest: Guest) -> None:
        """When the devices are quiet: nobody changes memory any more."""
        if self.spec.dump_dir is not None:
            self._write_dump(guest, "crash", self.spec.dump_dir)
        else:
            log.info('crash: for a guest dump of the next one, write dump = "DIRECTORY" under [system]')

    # -- end -----------------------------------------------------------------------------------

    def _terminate(self, end: GuestEnd) -> tuple[bool, tuple[StepResult, ...]]:
        guest = self._guest
        stopped = guest is None or _stop(guest)
        if not stopped:
            log.error("end: a vCPU did not stop within %g s; going on without it", VCPU_STOP_TIMEOUT)
        steps = self.plan.run(end)
        if guest is not None and stopped:
            if end.reason is Reason.GUEST_CRASH:
                self._dump_crash(guest)
            try:
                guest.close()
            except Exception:
                log.exception("end: cannot close the engine")
        if stopped:
            quiet = all(s.verdict == "ok" for s in steps if s.phase <= Phase.STOP_WORKERS or s.quiets)
            if quiet:
                # With a thread or a device still inside guest memory it stays until the process ends.
                self._memory.close()
        return stopped, steps


def _stop(guest: Guest) -> bool:
    try:
        return guest.stop(VCPU_STOP_TIMEOUT)
    except Exception:
        # An engine's fault must not keep the physical devices from being quiesced.
        log.exception("end: cannot stop the vCPUs")
        return False
