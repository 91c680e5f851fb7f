"""``qvm quiesce``, with simulated devices in the place of VFIO."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from qvm_quiesce import cli
from qvm_quiesce import state as files
from qvm_quiesce.attach import attach
from qvm_quiesce.clock import RealClock
from qvm_quiesce.evidence import DeviceEvidence, Evidence, Verdict
from qvm_quiesce.guard import Guard
from qvm_quiesce.hardware import HardwareError
from qvm_quiesce.keeper import KeeperError, _address, _adopt, _answer, ask
from qvm_quiesce.simulated import Faults, SimulatedDevice, shared
from qvm_quiesce.subject import Policy

from qvmcore.api import HostError, QvmError

SEQPACKET = socket.SOCK_SEQPACKET
NAME, OTHER = "0000:03:00.0", "0000:04:00.0"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return files.folder()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimulatedDevice], SimulatedDevice]:
    """``opened(device)``: what ``qvm quiesce`` opens, whatever the address."""

    def use(device: SimulatedDevice) -> SimulatedDevice:
        def opener(address: str) -> SimulatedDevice:
            assert cli._address(address) == device.name
            return device

        monkeypatch.setattr(cli, "_open", opener)
        return device

    return use


@pytest.fixture
def keeper(state: Path) -> Iterator[Callable[..., Guard]]:
    """``keeper(names...)``: a guard that holds their memory, and the quarantine that names it.

    The devices themselves are in ``keeper.devices``.
    """
    guards: list[Guard] = []

    def start(*names: str, faults: Faults | None = None) -> Guard:
        devices = [shared(name, faults) for name in names]
        start.devices = devices  # type: ignore[attr-defined]
        guard = Guard.start("vm", [(each, attach(each), Policy()) for each in devices], state)
        guards.append(guard)
        evidence = Evidence("vm", "vm", "end", time.time(), guard.pid, files.started(guard.pid))
        evidence.devices += [DeviceEvidence(name, "", Verdict.QUARANTINED, "it wrote on") for name in names]
        files.keep(evidence, state)
        guard.dismiss(names)
        limit = time.monotonic() + 20
        while not (all(each.done["surrendered"] for each in devices) and listens(guard.pid)):
            assert time.monotonic() < limit, "the guard does not become a keeper"
            time.sleep(0.005)
        return guard

    yield start
    for guard in guards:
        guard._process.kill()
        guard._process.wait()


def listens(pid: int) -> bool:
    """Whether a keeper can be asked already: it gives the devices back a moment before that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        try:
            channel.connect(_address(pid))
        except ConnectionRefusedError:
            return False
    return True


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.quiesce, arguments)


def refused(*arguments: str) -> str:
    """The message of a command that qvm refuses; click would print it without a traceback."""
    error = run(*arguments).exception
    assert isinstance(error, QvmError), error
    return str(error)


def test_status_of_a_host_where_nothing_has_happened(state: Path) -> None:
    result = run("status")
    assert result.exit_code == 0
    assert result.output.splitlines() == ["Quarantined devices: none", f"Records in {state / 'evidence'}:"]


def test_run_proves_a_device_quiet_and_ends_its_quarantine(state: Path, opened: Any, keeper: Any) -> None:
    """By what the keeper holds: as long as it does nobody can open the device anew."""
    guard = keeper(NAME)
    (device,) = keeper.devices
    fresh = opened(SimulatedDevice(NAME, clock=RealClock()))
    device.start()
    result = run("run", "pci:" + NAME)
    assert result.exit_code == 0, result.output
    assert "QUIESCED; record: " in result.output
    assert any(line.split()[:3] == [NAME, "bus-master-off", "ok"] for line in result.output.splitlines())
    assert not device.running and device.done["closed"] and device.done["unmapped"]
    assert not any(fresh.done.values())
    assert files.quarantined(state) == {}
    assert guard._process.wait(10) == -signal.SIGTERM, "the keeper is sent away"


def test_run_opens_a_device_whose_keeper_is_gone(state: Path, opened: Any, keeper: Any) -> None:
    guard = keeper(NAME)
    guard._process.kill()
    guard._process.wait()
    device = opened(SimulatedDevice(NAME, clock=RealClock()))
    device.start()
    assert run("run", NAME).exit_code == 0
    assert not device.running and device.done["closed"]
    assert files.quarantined(state) == {}


def test_a_keeper_that_does_not_answer_is_named(state: Path, opened: Any, keeper: Any) -> None:
    """Then whoever opens it says who holds the group."""
    guard = keeper(NAME)
    opened(SimulatedDevice(NAME, clock=RealClock()))
    os.kill(guard.pid, signal.SIGSTOP)
    try:
        result = run("run", NAME)
    finally:
        os.kill(guard.pid, signal.SIGCONT)
    assert f"process {guard.pid} holds the memory of {NAME}: timed out" in result.output
    assert result.exit_code == 0


def test_a_keeper_gives_only_what_it_holds_and_lives_on(state: Path, keeper: Any) -> None:
    guard = keeper(NAME)
    for device in (OTHER, "", "x" * 60000):
        with pytest.raises(KeeperError, match="it does not hold this device for us"):
            ask(guard.pid, device)
    before = len(os.listdir("/proc/self/fd"))
    hardware = ask(guard.pid, NAME)
    assert hardware.name == NAME
    assert len(os.listdir("/proc/self/fd")) > before
    with pytest.raises(KeeperError, match="Connection refused"):
        ask(os.getpid(), NAME)


def test_a_device_that_its_keeper_cannot_hand_over_is_told() -> None:
    """Of a platform device nothing is held."""

    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    with ours, theirs:
        for _ in range(2):  # and goes on
            ours.send(NAME.encode())
            _answer(theirs, {NAME: SimulatedDevice(NAME)})
            with pytest.raises(KeeperError, match="was not made by shared"):
                _adopt(ours.recv(4096), [])


def test_nobody_else_can_answer_for_a_keeper(state: Path) -> None:
    """Its name is anybody's to take."""
    with subprocess.Popen(["sleep", "60"]) as process, socket.socket(socket.AF_UNIX, SEQPACKET) as listener:
        listener.bind(_address(process.pid))
        listener.listen()
        with pytest.raises(KeeperError, match=f"not process {process.pid} answers"):
            ask(process.pid, NAME)
        process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing(state: Path, keeper: Any) -> None:
    guard = keeper(NAME)
    text = (
        "import os, sys; from qvm_quiesce.keeper import ask, KeeperError; os.setuid(65534)\n"
        f"try: ask({guard.pid}, '{NAME}')\nexcept KeeperError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.stdout == "it does not hold this device for us\n", done.stderr
    assert guard._process.poll() is None


def test_a_device_that_is_not_proven_quiet_stays_quarantined_with_its_keeper(
    state: Path, keeper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for the thread below on a busy host.
    monkeypatch.setattr("qvm_quiesce.subject.Policy", functools.partial(Policy, watch=0.3))
    guard = keeper(NAME, faults=Faults(masters_in_secret=True))
    (device,) = keeper.devices
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.001):
            device.tick()

    thread = threading.Thread(target=live)
    thread.start()
    result = run("run", NAME)
    over.set()
    thread.join()
    assert result.exit_code == 8
    assert "QUARANTINED" in result.output
    assert files.quarantined(state)[NAME]["keeper"] == guard.pid, "nobody loses track of it"
    assert guard._process.poll() is None
    status = run("status").output
    assert f"its memory is held by process {guard.pid}" in status
    assert "by the command: 0000:03:00.0" in status and "by the vm" in status


def test_a_device_that_is_not_there_any_more_is_an_error_in_words(opened: Any, state: Path) -> None:
    device = opened(SimulatedDevice(NAME, Faults(gone=True), RealClock()))
    assert "does not answer" in refused("run", NAME)
    assert device.done["closed"]


def test_plan_says_what_would_be_done_and_does_nothing(opened: Any, state: Path) -> None:
    device = opened(SimulatedDevice(NAME, nvme=True))
    device.start()
    result = run("plan", NAME.upper())
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "0000:03:00.0: 8086:1234 class 010802"
    assert lines[1:3] == ["  resets: flr", "  soft stop: nvme"]
    assert [line.split()[0] for line in lines[3:]] == [
        "revoke", "soft-stop", "bus-master-off", "mask-interrupts", "decode-off", "drain", "wake", "reset",
        "verify", "unmap", "restore",
    ]  # fmt: skip
    assert device.running and not any(done for name, done in device.done.items() if name != "closed")
    assert not state.exists()


def test_plan_of_a_device_that_fails_is_an_error_in_words(opened: Any) -> None:
    class Failing(SimulatedDevice):
        def config_read(self, offset: int, size: int) -> int:
            raise HardwareError("Input/output error")

    device = opened(Failing(NAME))
    assert refused("plan", NAME) == "Input/output error"
    assert device.done["closed"]


@pytest.mark.parametrize("command", ["plan", "run", "release"])
@pytest.mark.parametrize("word", ["", "eth0", "03:00.0", "0000:03:00.8", "0000:03:00.0 ", "../../x", "pci:"])
def test_a_wrong_address_is_told_with_an_example(state: Path, command: str, word: str) -> None:
    assert "is no PCI address; write domain:bus:device.function" in refused(command, word)


def test_release_of_a_device_that_is_not_quarantined_names_those_that_are(state: Path, keeper: Any) -> None:
    assert refused("release", NAME) == f"{NAME} is not quarantined; quarantined: no device"
    keeper(OTHER)
    assert refused("release", NAME) == f"{NAME} is not quarantined; quarantined: {OTHER}"


def test_release_ends_quarantine_and_keeper(state: Path, keeper: Any) -> None:
    guard = keeper(NAME)
    result = run("release", NAME)
    assert (result.exit_code, result.output) == (0, f"{NAME}: released\n")
    assert guard._process.wait(10) == -signal.SIGTERM


def test_a_keeper_of_two_devices_stays_for_the_second(state: Path, keeper: Any) -> None:
    guard = keeper(NAME, OTHER)
    assert f"process {guard.pid} goes on holding the memory of {OTHER}" in run("release", NAME).output
    assert guard._process.poll() is None
    assert run("release", OTHER).exit_code == 0
    assert guard._process.wait(10) == -signal.SIGTERM


def test_a_keeper_that_is_gone_is_nobody(state: Path, keeper: Any) -> None:
    guard = keeper(NAME)
    guard._process.kill()
    guard._process.wait()
    assert "held by" not in run("status").output
    assert run("release", NAME).exit_code == 0


def test_another_process_with_the_keepers_number_is_left_alone(state: Path, keeper: Any) -> None:
    """Also when that is a guard: the number counts only with the moment at which it began."""
    keeper(NAME)
    other = subprocess.Popen([sys.executable, "-c", "input()  # guard_main"], stdin=subprocess.PIPE)
    path = state / "quarantine" / f"{NAME}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "keeper": other.pid}))
    assert "held by" not in run("status").output
    assert run("release", NAME).exit_code == 0
    assert other.poll() is None
    other.communicate(b"\n")
    assert other.returncode == 0


def test_a_keeper_that_does_not_listen_yet_is_asked_again(state: Path) -> None:
    """A guard ignores SIGTERM until it is a keeper; the entry with its number is older than that."""
    text = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True);"
        "time.sleep(0.3);"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    pidfd = os.pidfd_open(process.pid)
    assert cli._end(pidfd)
    os.close(pidfd)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()


def test_a_damaged_record_is_shown_as_damaged(state: Path, opened: Any) -> None:
    opened(SimulatedDevice(NAME, clock=RealClock()))
    assert run("run", NAME).exit_code == 0
    (path,) = (state / "evidence").iterdir()
    path.write_text(path.read_text().replace("QUIESCED", "QUIESCEd"))
    assert f"{path.name}  DAMAGED: its checksum does not fit" in run("status").output
    path.write_bytes(b"\xff\xfe")
    assert "DAMAGED" in run("status").output


def test_a_damaged_quarantine_counts_and_can_be_released(state: Path) -> None:
    (state / "quarantine").mkdir(parents=True)
    (state / "quarantine" / f"{NAME}.json").write_text("{")
    assert f"  {NAME}  unreadable entry " in run("status").output
    assert run("release", NAME).exit_code == 0
    assert files.quarantined(state) == {}


def test_status_shows_as_many_records_as_asked_for(state: Path, opened: Any) -> None:
    opened(SimulatedDevice(NAME, clock=RealClock()))
    for _ in range(3):
        run("run", NAME)
    assert run("status", "--last", "2").output.count("by the command") == 2
    assert run("status", "--last", "-1").exit_code == 2


def test_a_record_that_cannot_be_written_is_an_error_in_words(
    state: Path, opened: Any, tmp_path: Path
) -> None:
    device = opened(SimulatedDevice(NAME, clock=RealClock()))
    (tmp_path / "qvm").write_text("in the way")
    assert "cannot write the record" in refused("run", NAME)
    assert device.done["reset"], "the device was quiesced all the same"


def test_without_vfio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qvm_vfio.hardware", None)
    assert refused("plan", NAME) == "physical devices need VFIO; pip install qvm-vfio"


def test_a_device_that_vfio_refuses_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        @staticmethod
        def open_device(name: str) -> None:
            raise HardwareError(f"{name} is in use")

    monkeypatch.setitem(sys.modules, "qvm_vfio.hardware", Fake)
    error = run("plan", NAME).exception
    assert isinstance(error, HostError) and str(error) == f"{NAME} is in use"
