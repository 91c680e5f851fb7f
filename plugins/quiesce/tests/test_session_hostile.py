"""The session: what refuses a start, who is guarded, what may delay the end of DMA and what may not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from qvm_quiesce import plugin, session, steps
from qvm_quiesce import state as files
from qvm_quiesce.cli import _end
from qvm_quiesce.guard import Guard, GuardError
from qvm_quiesce.runner import bound
from qvm_quiesce.session import Session
from qvm_quiesce.simulated import Faults, SimulatedDevice, shared
from qvm_quiesce.vdev import QuiesceOptions, QuiesceVdev

from qvmcore.api import HostError, Phase, PluginError, Vdev
from qvmcore.machine import Machine
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import machine

FAST: dict[str, Any] = {"drain_deadline": 0.1, "reset_deadline": 0.3, "watch": 0.1}


class Passes(Vdev):
    vdev_type = "passes"
    physical = True
    devices: Sequence[SimulatedDevice] = ()

    def hardware(self) -> Sequence[SimulatedDevice]:
        return self.devices


class One(QuiesceVdev):
    vdev_type = "one"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return files.folder()


@pytest.fixture
def devices() -> Iterator[Callable[..., list[SimulatedDevice]]]:
    stop, made = threading.Event(), list[SimulatedDevice]()

    def live() -> None:
        while not stop.wait(0.001):
            for device in made:
                device.tick()

    def make(*faults: Faults) -> list[SimulatedDevice]:
        made.extend(shared(f"0000:0a:0{n}.0", fault) for n, fault in enumerate(faults))
        Passes.devices = made
        return made

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    yield make
    stop.set()
    thread.join()
    for device in made:
        for fd in device.handover().fds:
            os.close(fd)


def build(
    tmp_path: Path,
    script: Callable[[ScriptedGuest], None] = ScriptedGuest.power_off,
    classes: Sequence[type[Vdev]] = (Passes, QuiesceVdev),
    values: dict[str, Any] | None = None,
    **options: Any,
) -> Machine:
    tables = values or {"quiesce": {**FAST, **options}}
    return machine(classes, ScriptedEngine(script), tmp_path, options=tables, plugins=[plugin])


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions of the machines of a test."""
    made: list[Session] = []
    original = Session.callbacks

    def remembered(self: Session) -> Any:
        made.append(self)
        return original(self)

    monkeypatch.setattr(Session, "callbacks", remembered)
    return made


def test_a_worker_that_writes_to_guest_memory_until_it_is_stopped_is_no_device(
    tmp_path: Path, devices: Any
) -> None:
    """The vdevs' workers are at work until STOP_WORKERS; the proof comes after it."""
    made = devices(Faults())

    class Busy(Vdev):
        vdev_type = "busy"

        def on_starting(self) -> None:
            self.ctx.worker.call(self._write)

        def _write(self) -> None:
            memory = made[0].memory()[0]
            memory[4096] = (memory[4096] + 1) % 256
            self.ctx.worker.call_later(0.0005, self._write)

    vm = build(tmp_path, classes=(Busy, Passes, QuiesceVdev))
    outcome = vm.run()
    assert outcome.code == 0, outcome.steps


def test_the_deadlines_in_the_plan_cover_all_that_the_steps_may_take(tmp_path: Path, devices: Any) -> None:
    devices(Faults())
    vm = build(tmp_path)
    vm.run()
    (policy,) = [slot.vdev.policy for slot in vm.slots if isinstance(slot.vdev, QuiesceVdev)]
    deadlines = {
        each.phase: each.deadline for each in vm.plan.callbacks if each.name == "quiesce" and each.quiets
    }
    assert deadlines[Phase.STOP_DMA] > bound(steps.STOP_DMA, [policy])
    assert deadlines[Phase.MASK_IRQ] > bound(steps.MASK_AND_RESET, [policy])
    assert deadlines[Phase.FLUSH] > bound(steps.PROVE, [policy])


def test_a_vdev_without_hardware_is_told_so(tmp_path: Path) -> None:
    class Empty(Vdev):
        vdev_type = "empty"
        physical = True

    with pytest.raises(PluginError, match=r"empty.*has a method hardware\(\)"):
        build(tmp_path, classes=(Empty, QuiesceVdev)).run()


def test_a_device_that_is_passed_twice_is_refused(tmp_path: Path, devices: Any) -> None:
    class Again(Passes):
        vdev_type = "again"

    devices(Faults())
    with pytest.raises(HostError, match=r"0000:0a:00\.0 is passed to this guest twice"):
        build(tmp_path, classes=(Passes, Again, QuiesceVdev)).run()


def test_a_vdev_counts_as_quieted_only_when_all_its_functions_are(tmp_path: Path, devices: Any) -> None:
    devices(Faults(), Faults())
    vm = machine(
        (Passes, One), ScriptedEngine(ScriptedGuest.power_off), tmp_path,
        options={"one": {**FAST, "device": "pci:0000:0A:00.0"}}, plugins=[plugin], require_quiesce=True,
    )  # fmt: skip
    with pytest.raises(HostError, match=r"nobody quiesces .*passes"):
        vm.run()


def test_the_case_of_an_address_does_not_matter() -> None:
    upper, lower = QuiesceOptions(device="pci:0000:0A:00.0"), QuiesceOptions(device="0000:0a:00.0")
    assert QuiesceVdev.claims(upper) == QuiesceVdev.claims(lower)


def test_a_start_is_refused_when_a_quarantine_could_not_be_written(tmp_path: Path, devices: Any) -> None:
    made = devices(Faults())
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(HostError, match=r"could not be quarantined.*set XDG_STATE_HOME"):
        build(tmp_path).run()
    assert not made[0].done["reset"]


def test_by_policy_a_vm_starts_without_a_place_for_records(
    tmp_path: Path, devices: Any, caplog: pytest.LogCaptureFixture
) -> None:
    devices(Faults())
    (tmp_path / "state").write_text("in the way")
    assert build(tmp_path, on_failure="report").run().code == 0
    assert "there will be no record" in caplog.text
    assert "quiesce: QUIESCED; cannot write the record" in caplog.text


def test_only_devices_whose_table_wants_a_guard_have_one(
    tmp_path: Path, devices: Any, sessions: list[Session]
) -> None:
    devices(Faults(), Faults())
    values = {"quiesce": FAST, "one": {**FAST, "device": "0000:0a:01.0", "guard": False}}
    build(tmp_path, classes=(Passes, QuiesceVdev, One), values=values).run()
    assert [hardware.name for hardware, _, _ in sessions[0]._guarded] == ["0000:0a:00.0"]


def test_a_guard_that_is_just_being_started_does_not_delay_the_end_of_dma(
    tmp_path: Path, devices: Any, sessions: list[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = devices(Faults())
    starting, go_on = threading.Event(), threading.Event()
    original = Guard.start.__func__  # type: ignore[attr-defined]
    seen: list[bool] = []

    def slow(cls: Any, *arguments: Any) -> Guard:
        if sessions:
            starting.set()
            go_on.wait(20)
            seen.append(made[0].running)
        guard: Guard = original(cls, *arguments)
        return guard

    monkeypatch.setattr(Guard, "start", classmethod(slow))

    def script(guest: ScriptedGuest) -> None:
        made[0].start()
        guard = sessions[0]._guard
        assert guard is not None
        os.kill(guard.pid, signal.SIGKILL)
        assert starting.wait(20)
        guest.power_off()
        limit = time.monotonic() + 20
        while made[0].running and time.monotonic() < limit:
            time.sleep(0.001)
        go_on.set()

    assert build(tmp_path, script).run().code == 0
    assert seen == [False], "DMA had stopped while the new guard was still being started"


@pytest.mark.parametrize("quarantined", [False, True])
def test_a_guard_that_is_just_being_started_is_waited_for_only_to_keep_memory(
    tmp_path: Path,
    devices: Any,
    sessions: list[Session],
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    quarantined: bool,
) -> None:
    made = devices(Faults(masters_in_secret=quarantined))
    starting = threading.Event()
    original = Guard.start.__func__  # type: ignore[attr-defined]
    wanted: list[bool] = []

    def slow(cls: Any, *arguments: Any) -> Guard:
        if sessions:
            starting.set()
            unwanted = arguments[3]
            limit = time.monotonic() + (2 if quarantined else 20)
            while not unwanted() and time.monotonic() < limit:
                time.sleep(0.001)
            wanted.append(not unwanted())
            if unwanted():
                raise GuardError("unwanted")
        guard: Guard = original(cls, *arguments)
        return guard

    monkeypatch.setattr(Guard, "start", classmethod(slow))

    def script(guest: ScriptedGuest) -> None:
        made[0].start()
        guard = sessions[0]._guard
        assert guard is not None
        os.kill(guard.pid, signal.SIGKILL)
        assert starting.wait(20)
        guest.power_off()

    vm = build(tmp_path, script)
    outcome = vm.run()
    vm._memory.close()
    assert wanted == [quarantined]
    assert (outcome.code, outcome.end.message) == (8 if quarantined else 0, "the guest powered off")
    assert "no guard process" not in caplog.text and "nobody guards" not in caplog.text
    if quarantined:
        pidfd = os.pidfd_open(files.quarantined(state)["0000:0a:00.0"]["keeper"])
        assert _end(pidfd), "the new guard holds the memory"
        os.close(pidfd)


def test_the_new_guard_that_comes_too_late_is_sent_away(
    tmp_path: Path, devices: Any, sessions: list[Session]
) -> None:
    devices(Faults())
    build(tmp_path).run()
    sessions[0]._guard_lost(-9)
    assert sessions[0]._guard is None


def test_a_guard_that_is_lost_again_and_again_is_not_replaced_for_ever(
    tmp_path: Path, devices: Any, sessions: list[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices(Faults())
    monkeypatch.setattr(session, "RESTARTS", 2)

    def script(guest: ScriptedGuest) -> None:
        last = None
        while not guest.stopping.is_set():
            guard = sessions[0]._guard
            if guard is not None and guard is not last:
                last = guard
                os.kill(guard.pid, signal.SIGKILL)
            time.sleep(0.002)

    outcome = build(tmp_path, script).run()
    assert (outcome.code, outcome.quiet) == (6, True)
    assert "nobody guards" in outcome.end.message


def test_one_table_that_wants_the_end_is_enough(
    tmp_path: Path, devices: Any, sessions: list[Session]
) -> None:
    devices(Faults(), Faults())
    values = {"quiesce": FAST, "one": {**FAST, "device": "0000:0a:01.0", "guard_lost": "end"}}

    def script(guest: ScriptedGuest) -> None:
        guard = sessions[0]._guard
        assert guard is not None
        os.kill(guard.pid, signal.SIGKILL)
        guest.wait()

    outcome = build(tmp_path, script, (Passes, QuiesceVdev, One), values).run()
    assert "nobody guards" in outcome.end.message


def test_a_verdict_that_is_not_good_is_shown_also_to_a_quiet_terminal(
    tmp_path: Path, devices: Any, caplog: pytest.LogCaptureFixture, state: Path
) -> None:
    made = devices(Faults(masters_in_secret=True))

    def script(guest: ScriptedGuest) -> None:
        made[0].start()
        guest.power_off()

    vm = build(tmp_path, script)
    outcome = vm.run()
    assert outcome.code == 8
    (shown,) = [each for each in caplog.records if "quiesce: QUARANTINED" in each.getMessage()]
    assert shown.levelname == "ERROR"
    assert "verify" in shown.getMessage()
    assert vm._memory.regions[0].fd != -1, "guest memory is not given back"
    vm._memory.close()
    pidfd = os.pidfd_open(files.quarantined(state)["0000:0a:00.0"]["keeper"])
    assert _end(pidfd), "the keeper goes when it is told"
    os.close(pidfd)


def test_a_lost_guard_is_no_keeper(
    tmp_path: Path, devices: Any, sessions: list[Session], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pid would be somebody else's one day."""
    made = devices(Faults(masters_in_secret=True))
    monkeypatch.setattr(Session, "_guard_lost", lambda self, status: None)

    def script(guest: ScriptedGuest) -> None:
        made[0].start()
        guard = sessions[0]._guard
        assert guard is not None
        os.kill(guard.pid, signal.SIGKILL)
        limit = time.monotonic() + 20
        while guard.running and time.monotonic() < limit:
            time.sleep(0.001)
        guest.power_off()

    vm = build(tmp_path, script)
    assert vm.run().code == 8
    vm._memory.close()
    assert files.quarantined(state)["0000:0a:00.0"]["keeper"] == 0
