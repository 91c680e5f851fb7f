"""The guard process under everything that may go wrong around it."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qvm_quiesce import guard as guard_module
from qvm_quiesce import state as files
from qvm_quiesce import steps
from qvm_quiesce.attach import attach
from qvm_quiesce.cli import _end
from qvm_quiesce.guard import Guard, GuardError
from qvm_quiesce.guard_main import _lingers, _receive
from qvm_quiesce.simulated import Faults, SimulatedDevice, shared
from qvm_quiesce.subject import Policy

QUICK: dict[str, Any] = {
    "soft_stop_deadline": 0.1,
    "drain_deadline": 0.1,
    "reset_deadline": 0.5,
    "watch": 0.1,
}

#: A VM process that takes a device over, starts a guard, and executes what it is told.
VM = """
import ctypes, json, os, signal, sys, threading, time
from pathlib import Path
from qvm_quiesce import runner
from qvm_quiesce.attach import attach
from qvm_quiesce.guard import Guard
from qvm_quiesce.simulated import adopt
from qvm_quiesce.subject import Policy

values, fds, state, policy = json.loads(sys.argv[1])
device = adopt(values, fds)
policy = Policy(**policy)
devices = [(device, attach(device), policy)]
guard = Guard.start("vm", devices, Path(state))
device.start()
print(guard.pid, flush=True)

def die_in(name):
    run = runner._Work.run
    def deadly(self):
        if self._step.name == name:
            # In the middle: what it writes is written, and nobody hears of it.
            for pause in self._step.run(self._view):
                break
            os.kill(os.getpid(), signal.SIGKILL)
        run(self)
    runner._Work.run = deadly
    quiesce = runner.Quiesce("vm", "vm", devices)
    quiesce.stop_dma("end")
    quiesce.prove()

exec(sys.stdin.readline().strip())
"""


def wait_for(holds: Callable[[], bool], what: str, limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {limit:g} s"
        time.sleep(0.005)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Vm:
    """Its device lives on in this process: it is the hardware."""

    def __init__(self, state: Path, faults: Faults | None = None, stderr: int | None = None, **policy: Any):
        self.device = shared("0000:01:00.0", faults, nvme=True)
        handover = self.device.handover()
        text = json.dumps([handover.values, handover.fds, str(state), {**QUICK, **policy}])
        self.process = subprocess.Popen(
            [sys.executable, "-c", VM, text],
            pass_fds=handover.fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        assert self.process.stdout is not None
        self.guard = int(self.process.stdout.readline())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        wait_for(lambda: self.device.written > 0, "DMA")

    def _live(self) -> None:
        while not self._stop.wait(0.001):
            self.device.tick()

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        limit = time.monotonic() + 20
        while running(self.guard) and time.monotonic() < limit:
            if files.quarantined():
                os.kill(self.guard, signal.SIGTERM)
            time.sleep(0.01)
        self._stop.set()
        self._thread.join()
        for fd in self.device.handover().fds:
            os.close(fd)
        assert not running(self.guard)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return files.folder()


@pytest.fixture
def start(state: Path) -> Iterator[Callable[..., Vm]]:
    machines: list[Vm] = []

    def begin(*arguments: Any, **more: Any) -> Vm:
        machines.append(Vm(state, *arguments, **more))
        return machines[-1]

    yield begin
    for machine in machines:
        machine.close()


def record(state: Path) -> dict[str, Any]:
    wait_for(lambda: any(files.records(state)), "the record")
    body = next(files.records(state))[1]
    assert body is not None, "the record is damaged"
    return body


@pytest.mark.parametrize(
    "step",
    [step.name for step in (*steps.STOP_DMA, *steps.MASK_AND_RESET, *steps.PROVE)],
)
def test_a_vm_that_dies_in_the_middle_of_its_own_steps_leaves_the_rest_to_the_guard(
    start: Callable[..., Vm], state: Path, step: str
) -> None:
    vm = start(Faults(reset_takes=0.1))
    vm.order(f"die_in({step!r})")
    body = record(state)
    assert (body["by"], body["verdict"]) == ("guard", "QUIESCED"), body["devices"]
    assert not vm.device.running and vm.device.done["unmapped"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the test has the number of exit(2) on x86-64")
def test_a_thread_stuck_in_the_kernel_does_not_hide_the_death(start: Callable[..., Vm], state: Path) -> None:
    """A killed VM lingers while one of its threads is in an uninterruptible call; its main thread is gone."""
    vm = start()
    vm.order("threading.Thread(target=time.sleep, args=(60,)).start(); ctypes.CDLL(None).syscall(60, 0)")
    body = record(state)
    assert body["by"] == "guard"
    assert not vm.device.running
    assert vm.process.poll() is None, "the process is not gone, its socket is still open"


def test_whoever_reads_what_the_vm_prints_does_not_wait_for_the_keeper(
    start: Callable[..., Vm], state: Path
) -> None:
    reading, writing = os.pipe()
    vm = start(Faults(masters_in_secret=True), stderr=writing)
    os.close(writing)
    vm.order("os.kill(os.getpid(), signal.SIGKILL)")
    with open(reading) as file:
        text = file.read()
    assert "qvm guard: vm: 0000:01:00.0: QUARANTINED: memory of the guest changed" in text
    assert running(vm.guard), "it holds the memory"


def test_a_terminal_that_is_gone_does_not_cost_the_memory(start: Callable[..., Vm], state: Path) -> None:
    reading, writing = os.pipe()
    vm = start(Faults(masters_in_secret=True), stderr=writing)
    os.close(writing)
    os.close(reading)
    vm.order("os.kill(os.getpid(), signal.SIGKILL)")
    wait_for(lambda: bool(files.quarantined(state)), "the quarantine")
    wait_for(lambda: vm.device.done["surrendered"], "the kernel's turn")
    assert running(vm.guard), "it holds the memory"
    assert not vm.device.done["closed"]


def test_a_state_folder_that_cannot_be_written_does_not_cost_the_memory(
    start: Callable[..., Vm], state: Path
) -> None:
    vm = start(Faults(masters_in_secret=True))
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text("in the way")
    vm.order("os.kill(os.getpid(), signal.SIGKILL)")
    wait_for(lambda: vm.device.done["surrendered"], "the kernel's turn")
    assert running(vm.guard), "it holds the memory"
    pidfd = os.pidfd_open(vm.guard)
    assert _end(pidfd)
    os.close(pidfd)


def test_by_policy_the_guard_only_reports(start: Callable[..., Vm], state: Path) -> None:
    vm = start(Faults(masters_in_secret=True), quarantine=False)
    vm.order("os.kill(os.getpid(), signal.SIGKILL)")
    assert record(state)["verdict"] == "QUARANTINED"
    wait_for(lambda: not running(vm.guard), "the guard's end")
    assert not files.quarantined(state)
    assert vm.device.done["closed"]


def test_words_that_make_no_sense_count_as_none(start: Callable[..., Vm], state: Path) -> None:
    vm = start()
    vm.order("guard._channel.send(b'nonsense'); time.sleep(60)")
    assert record(state)["by"] == "guard"


def test_a_keeper_hears_sigterm_whatever_its_starter_had_blocked(
    start: Callable[..., Vm], state: Path
) -> None:
    device = shared("0000:01:00.0")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        guard = Guard.start("vm", [(device, attach(device), Policy())], state)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    guard.dismiss(["0000:01:00.0"])
    wait_for(lambda: device.done["surrendered"], "the keeper")
    wait_for(lambda: _ended(guard), "the keeper's end")


def _ended(guard: Guard) -> bool:
    guard._process.terminate()
    return guard._process.poll() is not None


def test_a_device_that_cannot_be_given_back_is_nobody_elses_trouble(state: Path) -> None:
    from qvm_quiesce.guard_main import _give_back

    class Bad(SimulatedDevice):
        def close(self) -> None:
            raise OSError("no")

        surrender = close

    bad, good = Bad("0000:01:00.0"), SimulatedDevice("0000:02:00.0")
    _give_back("vm", [bad, good], {"0000:01:00.0"})
    assert good.done["closed"]


def test_an_installed_package_cannot_take_the_place_of_the_standard_library(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = shared("0000:01:00.0")
    beside = tmp_path / "site"
    beside.mkdir()
    for name in ("enum", "json", "socket", "dataclasses", "threading"):
        (beside / f"{name}.py").write_text("raise ImportError('not the one of the standard library')")
    handover = device.handover()
    monkeypatch.setattr(device, "handover", lambda: handover._replace(path=str(beside)))
    guard = Guard.start("vm", [(device, attach(device), Policy())], state)
    guard.dismiss()


def test_a_guard_has_no_descriptor_but_its_own_and_holds_no_folder(state: Path, tmp_path: Path) -> None:
    device = shared("0000:01:00.0")
    other, another = os.pipe()
    pipe = str(Path(f"/proc/self/fd/{other}").readlink())
    guard = Guard.start("vm", [(device, attach(device), Policy())], state)
    try:
        fds = [str(each.readlink()) for each in Path(f"/proc/{guard.pid}/fd").iterdir()]
        cwd = Path(f"/proc/{guard.pid}/cwd").readlink()
    finally:
        guard.dismiss()
        os.close(other)
        os.close(another)
    assert pipe not in fds
    # Python's mmap keeps a descriptor of its own.
    expected = 3 + 1 + 1 + 2 + 2 * 2
    assert len(fds) == expected, f"standard ones, socket, pidfd, lifeline and bell, the device's two: {fds}"
    assert cwd == Path("/")


def test_too_many_descriptors_are_told_not_waited_for() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    text = json.dumps({"fds": 30}).encode()
    ours.send(len(text).to_bytes(4, "little"))
    ours.send(text)
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(30)]
    socket.send_fds(ours, [b"fds"], opened)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = set(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + 5, hard))
    try:
        with pytest.raises(OSError, match="ulimit -n"):
            _receive(theirs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in {int(name) for name in set(os.listdir("/proc/self/fd")) - before}:
            try:
                os.close(fd)
            except OSError:
                pass  # that of the listing itself
        for fd in opened:
            os.close(fd)
        ours.close()
        theirs.close()


def test_nothing_is_left_when_a_guard_cannot_be_started(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = shared("0000:01:00.0")
    record = attach(device)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(FileNotFoundError):
        Guard.start("vm", [(device, record, Policy())], state)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``python(script)``: what runs in the place of a guard, which would be ``"$@"``."""

    def replace(script: str) -> None:
        stub = tmp_path / "python"
        stub.write_text(f'#!/bin/sh\nset -- {sys.executable} "$@"\n{script}\n')
        stub.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(stub))

    return replace


def test_a_busy_host_does_not_fail_the_start(
    state: Path, python: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty seconds have passed before the guard was looked at for the second time."""
    device = shared("0000:01:00.0")
    passed = itertools.chain([0.0], itertools.repeat(20.0))
    monkeypatch.setattr(guard_module, "time", SimpleNamespace(monotonic=lambda: next(passed)))
    python('sleep 0.5; exec "$@"')
    guard = Guard.start("vm", [(device, attach(device), Policy())], state)
    assert guard.running and next(passed) == 20.0
    guard.dismiss()


@pytest.mark.parametrize(
    ("limit", "unwanted", "message"),
    [(0.2, False, r"did not start within 0\.2 s"), (60.0, True, "is not wanted any more")],
    ids=["hangs", "unwanted"],
)
def test_a_guard_that_does_not_start_is_not_waited_for(
    state: Path,
    python: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    limit: float,
    unwanted: bool,
    message: str,
) -> None:
    device = shared("0000:01:00.0")
    record = attach(device)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(guard_module, "START_TIMEOUT", limit)
    python("exec sleep 60")
    with pytest.raises(GuardError, match=message):
        Guard.start("vm", [(device, record, Policy())], state, lambda: unwanted)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("State:\tS (sleeping)\nSigPnd:\t0000000000000000\nCoreDumping:\t0\n", False),
        ("State:\tI (idle)\nSigPnd:\t0000000000000000\nCoreDumping:\t1\n", True),
        ("State:\tZ (zombie)\nSigPnd:\t0000000000000000\n", True),
        ("State:\tD (disk sleep)\nSigPnd:\t0000000000000100\n", True),
        ("", False),
    ],
    ids=["alive", "core dump", "main thread gone", "killed in a call", "unreadable"],
)
def test_a_vm_that_is_dead_but_for_the_kernel_s_work_is_seen(
    tmp_path: Path, lines: str, expected: bool
) -> None:
    """A core dump is written before anything of the process is given back, its lifeline included."""
    (tmp_path / "status").write_text(lines)
    assert _lingers(f"..{tmp_path}") is expected  # type: ignore[arg-type]  # /proc/../ and that path
