"""The quiesce of one running VM: attach at the start, the steps in the phases of its end, the record.

A vdev that gives a physical device to the guest (``physical = True``) has a method ``hardware()`` that
gives the :class:`~qvm_quiesce.hardware.Hardware` of each function it passes.

What runs when: DMA stops first of all; interrupts and the reset follow; the proof waits until the vdevs'
workers have stopped, because they write to the guest's memory too, and runs before anything is released.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvm_quiesce import state as files
from qvm_quiesce import steps
from qvm_quiesce.attach import attach
from qvm_quiesce.evidence import Verdict, text_table
from qvm_quiesce.guard import START_TIMEOUT, Device, Guard, GuardError
from qvm_quiesce.hardware import Hardware, HardwareError
from qvm_quiesce.runner import Quiesce, bound
from qvm_quiesce.softstop import script as register_script
from qvm_quiesce.vdev import ALL, QuiesceVdev
from qvmcore.api import GuestEnd, HostError, NotQuiet, Phase, PluginError, TerminationCallback

log = logging.getLogger("qvm.quiesce")

#: Seconds beyond what the steps themselves may take.
_MARGIN = 2.0
#: A guard that is lost more often than this within so many seconds is not replaced again.
RESTARTS, RESTART_SECONDS = 5, 60.0


def callbacks(machine: Any) -> Sequence[TerminationCallback]:
    """Get ready for the end of ``machine``. Raises HostError to refuse its start."""
    tables = [slot.vdev for slot in machine.slots if isinstance(slot.vdev, QuiesceVdev)]
    passed = [(slot.name, each) for slot in machine.slots if slot.cls.physical for each in _hardware(slot)]
    names = [hardware.name for _, hardware in passed]
    for twice in {name for name in names if names.count(name) > 1}:
        raise HostError(f"{twice} is passed to this guest twice")
    chosen = [(each, table) for _, each in passed if (table := _table_for(tables, each)) is not None]
    covered = {hardware.name for hardware, _ in chosen}
    for name, hardware in passed:
        if hardware.name not in covered:
            log.warning('%s: nobody quiesces %s: add a [[vdev]] with type = "quiesce"', name, hardware.name)
    for table in tables:
        if table.options.device != ALL and not any(table.matches(name) for name in names):
            raise HostError(
                f"{table.ctx.name}: no vdev passes the device {table.options.device!r} to this guest",
                hint=f"passed are: {', '.join(names) or 'none'}",
            )
    if not chosen:
        return ()
    if machine.spec.require_quiesce:
        _refuse_unprovable(chosen)
    # A vdev is quieted when all of its functions are.
    bare = {name for name, hardware in passed if hardware.name not in covered}
    quiets = tuple(dict.fromkeys(name for name, _ in passed if name not in bare))
    return Session(machine.spec.name, chosen, quiets).callbacks()


def _hardware(slot: Any) -> Sequence[Hardware]:
    give = getattr(slot.vdev, "hardware", None)
    if give is None:
        raise PluginError(f"{slot.spec.where}: a vdev with physical = True has a method hardware()")
    found: Sequence[Hardware] = give()
    return found


def _refuse_unprovable(chosen: Sequence[tuple[Hardware, QuiesceVdev]]) -> None:
    """``[safety] require-quiesce``: without a proof there is nothing that was required. Raises HostError."""
    for hardware, table in chosen:
        if hardware.platform and not register_script.proves(table.policy):
            raise HostError(
                f"[safety] require-quiesce: only a register script can prove {hardware.name} quiet, "
                "and it must wait for a register",
                hint=f'a [[vdev]] with type = "quiesce", device = "{hardware.name}" and script = [...]',
            )


def _table_for(tables: Sequence[QuiesceVdev], hardware: Hardware) -> QuiesceVdev | None:
    """The table that names the device, else the one for all."""
    named = [table for table in tables if table.matches(hardware.name)]
    return next(iter([*named, *(table for table in tables if table.options.device == ALL)]), None)


class Session:
    """Attached devices with their guard. Made on the main thread, before the guest starts.

    ``quiets`` are the vdevs whose devices these are.
    """

    def __init__(
        self, vm: str, chosen: Sequence[tuple[Hardware, QuiesceVdev]], quiets: tuple[str, ...]
    ) -> None:
        self._vm = vm
        self._quiets = quiets
        self._tables = {hardware.name: table for hardware, table in chosen}
        self._state = self._prepare_state()
        self._refuse_quarantined()
        try:
            self._devices: list[Device] = [(each, attach(each), table.policy) for each, table in chosen]
        except HardwareError as error:
            raise HostError(str(error)) from error
        self._quiesce = Quiesce(vm, "vm", self._devices)
        self._guarded = [each for each in self._devices if self._tables[each[0].name].options.guard]
        #: Held while a guard starts. Never waited for before DMA has stopped.
        self._lock = threading.Lock()
        self._ending = threading.Event()
        #: Set when the proof is over and no memory is to be kept: nobody waits for a new guard any more.
        self._unwanted = threading.Event()
        self._lost: deque[float] = deque(maxlen=RESTARTS)
        self._guard: Guard | None = None
        if self._guarded:
            with self._lock:
                self._guard = self._start_guard()

    def callbacks(self) -> list[TerminationCallback]:
        """What runs in which phase of the end."""
        policies = [policy for _, _, policy in self._devices]
        stop, mask, prove = (
            bound(each, policies) + _MARGIN for each in (steps.STOP_DMA, steps.MASK_AND_RESET, steps.PROVE)
        )
        # The report waits for a guard that is just being started: to its end when it is to keep memory.
        report = prove + START_TIMEOUT + _MARGIN
        return [
            TerminationCallback("quiesce", Phase.STOP_DMA, self._stop_dma, stop, self._quiets),
            TerminationCallback("quiesce", Phase.MASK_IRQ, self._mask, mask, self._quiets),
            TerminationCallback("quiesce", Phase.FLUSH, self._prove_and_report, report, self._quiets),
        ]

    def _stop_dma(self, end: GuestEnd) -> None:
        self._ending.set()
        self._quiesce.stop_dma(f"{end.reason}: {end.message}" if end.message else str(end.reason))

    def _mask(self, _end: GuestEnd) -> None:
        self._quiesce.mask()

    def _prove_and_report(self, _end: GuestEnd) -> None:
        try:
            self._quiesce.prove()
        finally:
            self._report()
        bad = [each for each in self._quiesce.evidence.devices if each.verdict is not Verdict.QUIESCED]
        if bad:
            raise NotQuiet("; ".join(f"{each.device}: {each.verdict.value}: {each.reason}" for each in bad))

    def _report(self) -> None:
        """The record first: the guard may go only when it is written."""
        evidence = self._quiesce.evidence
        keep = [
            device.device
            for device in evidence.devices
            if device.verdict is Verdict.QUARANTINED
            and self._tables[device.device].options.on_failure == "quarantine"
        ]
        held = [hardware.name for hardware, _, _ in self._guarded if hardware.name in keep]
        if not held:
            self._unwanted.set()
        with self._lock:
            # Nobody starts another one from here on: the devices are released next.
            guard, self._guard = self._guard, None
        if guard is not None and guard.running and held:
            evidence.keeper, evidence.keeper_started = guard.pid, files.started(guard.pid)
        level = logging.INFO if evidence.verdict is Verdict.QUIESCED else logging.ERROR
        try:
            path = f"record: {files.keep(evidence, self._state, keep)}"
        except OSError as error:
            path, level = f"cannot write the record: {error}", logging.ERROR
        log.log(level, "quiesce: %s; %s\n%s", evidence.verdict.value, path, text_table(evidence.devices))
        if guard is not None:
            guard.dismiss(held)

    def _prepare_state(self) -> Path:
        # Below a file that is no folder nothing can be written, by nobody.
        root = Path(os.devnull) / "state"
        try:
            root = files.folder()
            files.check(root)
        except OSError as error:
            if any(table.options.on_failure == "quarantine" for table in self._tables.values()):
                raise HostError(
                    f"quiesce: a device that is not proven quiet could not be quarantined: {error}",
                    hint='set XDG_STATE_HOME to a folder of yours, or on-failure = "report"',
                ) from error
            log.warning("quiesce: there will be no record: %s", error)
        return root

    def _refuse_quarantined(self) -> None:
        entries = files.quarantined(self._state)
        for name in self._tables:
            if name in entries:
                raise HostError(
                    f"{name} is quarantined: {entries[name]['reason']}",
                    hint=f"qvm quiesce run {name}, or qvm quiesce release {name} when you know better",
                )

    # -- the guard -----------------------------------------------------------------------------------

    def _start_guard(self) -> Guard:
        try:
            guard = Guard.start(self._vm, self._guarded, self._state, self._unwanted.is_set)
        except (GuardError, HardwareError, OSError) as error:
            raise HostError(
                f"quiesce: no guard process: {error}", hint="guard = false does without"
            ) from error
        guard.watch(self._guard_lost)
        return guard

    def _guard_lost(self, status: int) -> None:
        """On the thread that waits for the guard: a new one, or the end."""
        log.error("quiesce: the guard process ended (status %d, pid of the VM %d)", status, os.getpid())
        tables = [self._tables[hardware.name] for hardware, _, _ in self._guarded]
        with self._lock:
            if self._ending.is_set() or self._guard is None:
                return
            now = time.monotonic()
            often = len(self._lost) == RESTARTS and now - self._lost[0] < RESTART_SECONDS
            self._lost.append(now)
            if often:
                log.error("quiesce: it was lost %d times within %g s", RESTARTS, RESTART_SECONDS)
            elif all(table.options.guard_lost == "restart" for table in tables):
                try:
                    self._guard = self._start_guard()
                    log.info("quiesce: a new guard process watches (pid %d)", self._guard.pid)
                    return
                except HostError as error:
                    if self._unwanted.is_set():
                        return
                    log.error("%s", error)
        tables[0].ctx.request_shutdown("nobody guards the physical devices any more")
