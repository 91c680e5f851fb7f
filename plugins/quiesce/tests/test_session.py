"""The quiesce of a whole machine: which devices, in which phases, with what exit code and record."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from qvm_quiesce import plugin
from qvm_quiesce import state as files
from qvm_quiesce.cli import _end
from qvm_quiesce.evidence import Verdict
from qvm_quiesce.session import Session
from qvm_quiesce.simulated import Faults, SimulatedDevice, shared
from qvm_quiesce.vdev import QuiesceVdev

from qvmcore.api import HostError, Vdev
from qvmcore.machine import Outcome
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import machine

FAST: dict[str, Any] = {"drain_deadline": 0.1, "reset_deadline": 0.3, "watch": 0.1}


class SimPass(Vdev):
    """Passes one simulated device to the guest, whose driver starts it when the guest starts."""

    vdev_type = "sim-pass"
    physical = True
    devices: Sequence[SimulatedDevice] = ()

    def hardware(self) -> Sequence[SimulatedDevice]:
        return self.devices


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return files.folder()


@pytest.fixture
def devices() -> Iterator[Callable[..., list[SimulatedDevice]]]:
    """``devices(faults, ...)``: simulated devices that live until the test ends."""
    stop, made = threading.Event(), list[SimulatedDevice]()

    def live() -> None:
        while not stop.wait(0.001):
            for device in made:
                device.tick()

    def make(*faults: Faults) -> list[SimulatedDevice]:
        made.extend(shared(f"0000:0{n}:00.0", fault) for n, fault in enumerate(faults, 1))
        SimPass.devices = made
        return made

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    yield make
    stop.set()
    thread.join()
    for device in made:
        for fd in device.handover().fds:
            os.close(fd)


def run(
    tmp_path: Path, guest: Callable[[ScriptedGuest], None], classes: Sequence[type[Vdev]], **options: Any
) -> Outcome:
    values = {"quiesce": {**FAST, **options}}
    vm = machine(classes, ScriptedEngine(guest), tmp_path, options=values, plugins=[plugin])
    return vm.run()


def drive(guest: ScriptedGuest) -> None:
    """The guest's drivers start every device; it powers off while they are at work."""
    for device in SimPass.devices:
        device.start()
    deadline = time.monotonic() + 10
    while not all(device.written for device in SimPass.devices) and time.monotonic() < deadline:
        time.sleep(0.001)
    guest.power_off()


def test_a_guest_that_leaves_its_devices_at_work(tmp_path: Path, state: Path, devices: Any) -> None:
    made = devices(Faults(), Faults())
    outcome = run(tmp_path, drive, (SimPass, QuiesceVdev))
    assert (outcome.code, outcome.quiet) == (0, True)
    assert all(device.written for device in made), "they were at work"
    assert not any(device.running for device in made)
    _, body = next(files.records(state))
    assert body is not None
    assert (body["by"], body["verdict"], len(body["devices"])) == ("vm", "QUIESCED", 2)
    assert body["cause"].startswith("guest-shutdown")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_an_end_by_signal(tmp_path: Path, devices: Any, number: signal.Signals) -> None:
    made = devices(Faults())

    def script(guest: ScriptedGuest) -> None:
        made[0].start()
        os.kill(os.getpid(), number)
        guest.wait()

    assert run(tmp_path, script, (SimPass, QuiesceVdev)).quiet
    assert not made[0].running


def test_a_device_that_is_not_proven_quiet_makes_the_exit_code_8(
    tmp_path: Path, state: Path, devices: Any
) -> None:
    devices(Faults(), Faults(masters_in_secret=True))
    outcome = run(tmp_path, drive, (SimPass, QuiesceVdev))
    assert (outcome.code, outcome.quiet) == (8, False)
    assert list(files.quarantined(state)) == ["0000:02:00.0"]
    with pytest.raises(HostError, match=r"0000:02:00\.0 is quarantined: memory of the guest changed"):
        run(tmp_path, drive, (SimPass, QuiesceVdev))
    pidfd = os.pidfd_open(files.quarantined(state)["0000:02:00.0"]["keeper"])
    assert _end(pidfd), "the keeper goes when it is told"
    os.close(pidfd)
    assert files.release("0000:02:00.0", state)


def test_a_degraded_quiesce_is_8_too_but_no_quarantine(tmp_path: Path, state: Path, devices: Any) -> None:
    devices(Faults(pending=60))
    assert run(tmp_path, drive, (SimPass, QuiesceVdev)).code == 8
    assert not files.quarantined(state)


def test_on_failure_report_quarantines_nothing(tmp_path: Path, state: Path, devices: Any) -> None:
    devices(Faults(masters_in_secret=True))
    assert run(tmp_path, drive, (SimPass, QuiesceVdev), on_failure="report").code == 8
    assert not files.quarantined(state)


def test_a_quiesce_that_hangs_is_8(tmp_path: Path, devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only a bad verdict: no verdict, too."""
    devices(Faults())
    monkeypatch.setattr("qvm_quiesce.session._MARGIN", 0.5)
    monkeypatch.setattr("qvm_quiesce.session.bound", lambda steps, policies: 0.0)
    stuck = threading.Event()
    monkeypatch.setattr(Session, "_mask", lambda self, end: stuck.wait(30) and None)
    outcome = run(tmp_path, drive, (SimPass, QuiesceVdev), guard=False)
    assert outcome.code == 8
    stuck.set()


def test_a_table_for_a_device_nobody_passes_is_refused(tmp_path: Path, devices: Any) -> None:
    devices(Faults())
    with pytest.raises(HostError, match=r"no vdev passes the device 'pci:0000:09:00\.0'.*0000:01:00\.0"):
        run(tmp_path, drive, (SimPass, QuiesceVdev), device="pci:0000:09:00.0")


def test_a_table_of_its_own_goes_before_the_one_for_all(tmp_path: Path, state: Path, devices: Any) -> None:
    class Own(QuiesceVdev):
        vdev_type = "quiesce-own"

    devices(Faults(), Faults())
    values = {
        "quiesce": FAST,
        "quiesce-own": {**FAST, "device": "pci:0000:02:00.0", "reset": "none"},
    }
    vm = machine(
        (SimPass, QuiesceVdev, Own), ScriptedEngine(drive), tmp_path, options=values, plugins=[plugin]
    )
    vm.run()
    _, body = next(files.records(state))
    assert body is not None
    resets = {
        each["device"]: next(step["verdict"] for step in each["steps"] if step["step"] == "reset")
        for each in body["devices"]
    }
    assert resets == {"0000:01:00.0": "ok", "0000:02:00.0": "skipped"}


def test_require_quiesce_refuses_a_device_nobody_quiesces(tmp_path: Path, devices: Any) -> None:
    made = devices(Faults())
    vm = machine((SimPass,), ScriptedEngine(drive), tmp_path, require_quiesce=True, plugins=[plugin])
    with pytest.raises(HostError, match=r"nobody quiesces .*sim-pass"):
        vm.run()
    assert not made[0].written, "the guest was never started"


def test_require_quiesce_is_content_with_one(tmp_path: Path, devices: Any) -> None:
    devices(Faults())
    vm = machine(
        (SimPass, QuiesceVdev), ScriptedEngine(drive), tmp_path, options={"quiesce": FAST},
        require_quiesce=True, plugins=[plugin],
    )  # fmt: skip
    assert vm.run().code == 0


def test_the_guard_is_replaced_when_it_is_killed(
    tmp_path: Path, devices: Any, caplog: pytest.LogCaptureFixture
) -> None:
    devices(Faults())
    made: list[Session] = []
    original = Session.callbacks

    def remembered(self: Session) -> Any:
        made.append(self)
        return original(self)

    def script(guest: ScriptedGuest) -> None:
        session = made[0]
        first = session._guard
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while session._guard is first and time.monotonic() < deadline:
            time.sleep(0.005)
        assert session._guard is not first
        drive(guest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "callbacks", remembered)
        caplog.set_level("INFO")
        assert run(tmp_path, script, (SimPass, QuiesceVdev)).code == 0
    assert "a new guard process watches" in caplog.text


def test_by_policy_the_vm_ends_when_its_guard_is_killed(tmp_path: Path, devices: Any) -> None:
    devices(Faults())
    made: list[Session] = []
    original = Session.callbacks

    def remembered(self: Session) -> Any:
        made.append(self)
        return original(self)

    def script(guest: ScriptedGuest) -> None:
        assert made[0]._guard is not None
        os.kill(made[0]._guard.pid, signal.SIGKILL)
        guest.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "callbacks", remembered)
        outcome = run(tmp_path, script, (SimPass, QuiesceVdev), guard_lost="end")
    assert (outcome.code, outcome.quiet) == (6, True)
    assert "nobody guards" in outcome.end.message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"offset": 0}, "expected offset and either write or equals"),
        ({"offset": 0, "wriet": 1}, "unknown key 'wriet'"),
        ({"offset": 0, "write": 1 << 32}, "does not fit 4 bytes"),
        ({"offset": 0, "write": 1, "size": 3}, "size is 1, 2, 4 or 8"),
        ({"offset": 0, "write": 1, "bar": 6}, "bar is 0 to 5"),
    ],
)
def test_a_script_that_cannot_run_is_refused_before_the_start(
    tmp_path: Path, devices: Any, entry: dict[str, int], message: str
) -> None:
    devices(Faults())
    with pytest.raises(HostError, match=message):
        run(tmp_path, drive, (SimPass, QuiesceVdev), script=[entry])


def test_a_passed_device_without_quiesce_is_warned_about(
    tmp_path: Path, devices: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = devices(Faults())
    vm = machine((SimPass,), ScriptedEngine(drive), tmp_path, plugins=[plugin])
    assert vm.run().code == 0
    assert "nobody quiesces 0000:01:00.0" in caplog.text
    assert made[0].running, "the danger is real: without quiesce it goes on"
    assert Verdict.QUIESCED.rank < Verdict.QUARANTINED.rank
