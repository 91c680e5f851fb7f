"""The quiesce of one running VM: attach at the start, the steps in the phases of its end, the record.

A vdev that gives a physical device to the guest (``physical = True``) has a method ``hardware()`` that
gives the :class:`~qvm_quiesce.hardware.Hardware` of each function it passes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

from qvm_quiesce import state as files
from qvm_quiesce.attach import attach
from qvm_quiesce.evidence import Verdict, text_table
from qvm_quiesce.guard import Device, Guard, GuardError
from qvm_quiesce.hardware import Hardware, HardwareError
from qvm_quiesce.runner import Quiesce
from qvm_quiesce.vdev import ALL, QuiesceVdev
from qvmcore.api import GuestEnd, HostError, NotQuiet, Phase, TerminationCallback

log = logging.getLogger("qvm.quiesce")

#: Seconds beyond the deadlines of the steps themselves.
_MARGIN = 5.0


def callbacks(machine: Any) -> Sequence[TerminationCallback]:
    """Get ready for the end of ``machine``. Raises HostError to refuse its start."""
    tables = [slot.vdev for slot in machine.slots if isinstance(slot.vdev, QuiesceVdev)]
    passed = [
        (slot.name, each) for slot in machine.slots if slot.cls.physical for each in slot.vdev.hardware()
    ]
    chosen = [(name, each, table) for name, each in passed if (table := _table_for(tables, each)) is not None]
    for name, hardware in passed:
        if not any(hardware is each for _, each, _ in chosen):
            log.warning('%s: nobody quiesces %s: add a [[vdev]] with type = "quiesce"', name, hardware.name)
    for table in tables:
        if table.options.device != ALL and not any(table.matches(each.name) for _, each in passed):
            raise HostError(
                f"{table.ctx.name}: no vdev passes the device {table.options.device!r} to this guest",
                hint=f"passed are: {', '.join(each.name for _, each in passed) or 'none'}",
            )
    return Session(machine.spec.name, chosen).callbacks() if chosen else ()


def _table_for(tables: Sequence[QuiesceVdev], hardware: Hardware) -> QuiesceVdev | None:
    """The table that names the device, else the one for all."""
    named = [table for table in tables if table.matches(hardware.name)]
    return next(iter([*named, *(table for table in tables if table.options.device == ALL)]), None)


class Session:
    """Attached devices with their guard. Made on the main thread, before the guest starts."""

    def __init__(self, vm: str, chosen: Sequence[tuple[str, Hardware, QuiesceVdev]]) -> None:
        self._vm = vm
        self._names = tuple(dict.fromkeys(name for name, _, _ in chosen))
        self._tables = {hardware.name: table for _, hardware, table in chosen}
        self._state = files.folder()
        self._refuse_quarantined()
        try:
            self._devices: list[Device] = [(each, attach(each), table.policy) for _, each, table in chosen]
        except HardwareError as error:
            raise HostError(str(error)) from error
        self._quiesce = Quiesce(vm, "vm", self._devices)
        self._lock = threading.Lock()
        self._ending = False
        self._guard: Guard | None = None
        if any(table.options.guard for _, _, table in chosen):
            self._guard = self._start_guard()

    def callbacks(self) -> list[TerminationCallback]:
        """What runs in which phase of the end."""
        policies = [policy for _, _, policy in self._devices]
        soft = max(policy.soft_stop_deadline for policy in policies)
        rest = max(each.drain_deadline + each.reset_deadline + each.watch for each in policies)
        return [
            TerminationCallback("quiesce", Phase.STOP_DMA, self._stop_dma, soft + _MARGIN, self._names),
            TerminationCallback("quiesce", Phase.MASK_IRQ, self._prove, rest + 3 * _MARGIN, self._names),
            TerminationCallback("quiesce", Phase.FLUSH, self._report, _MARGIN),
        ]

    def _stop_dma(self, end: GuestEnd) -> None:
        with self._lock:
            self._ending = True
        self._quiesce.stop_dma(f"{end.reason}: {end.message}" if end.message else str(end.reason))

    def _prove(self, _end: GuestEnd) -> None:
        verdict = self._quiesce.prove()
        if verdict is not Verdict.QUIESCED:
            bad = [each for each in self._quiesce.evidence.devices if each.verdict is not Verdict.QUIESCED]
            raise NotQuiet("; ".join(f"{each.device}: {each.verdict.value}: {each.reason}" for each in bad))

    def _report(self, _end: GuestEnd) -> None:
        """The record first: the guard may go only when it is written."""
        evidence, guard = self._quiesce.evidence, self._guard
        keep = [
            each.device
            for each in evidence.devices
            if each.verdict is Verdict.QUARANTINED
            and self._tables[each.device].options.on_failure == "quarantine"
        ]
        evidence.keeper = guard.pid if guard is not None and keep else 0
        try:
            path = files.keep(evidence, self._state, keep)
            log.info(
                "quiesce: %s; record: %s\n%s", evidence.verdict.value, path, text_table(evidence.devices)
            )
        except OSError as error:
            log.error("quiesce: %s; cannot write the record: %s", evidence.verdict.value, error)
        if guard is not None:
            guard.dismiss(keep)

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
            guard = Guard.start(self._vm, self._devices, self._state)
        except (GuardError, HardwareError, OSError) as error:
            raise HostError(
                f"quiesce: no guard process: {error}", hint="guard = false does without"
            ) from error
        guard.watch(self._guard_lost)
        return guard

    def _guard_lost(self, status: int) -> None:
        """On the thread that waits for the guard: a new one, or the end."""
        with self._lock:
            if self._ending:
                return
            table = next(iter(self._tables.values()))
            log.error("quiesce: the guard process ended (status %d, pid of the VM %d)", status, os.getpid())
            if table.options.guard_lost == "restart":
                try:
                    self._guard = self._start_guard()
                    log.info("quiesce: a new guard process watches (pid %d)", self._guard.pid)
                    return
                except HostError as error:
                    log.error("%s", error)
            table.ctx.request_shutdown("nobody guards the physical devices any more")
