"""The guard process: every way a VM process can end, watched on devices that both processes share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qvm_quiesce import state as files
from qvm_quiesce.attach import attach
from qvm_quiesce.cli import _end
from qvm_quiesce.guard import Guard, GuardError
from qvm_quiesce.simulated import Faults, SimulatedDevice, adopt, shared
from qvm_quiesce.subject import Policy

#: A VM process: it takes over two devices, starts a guard and the devices, and then does as it is told.
VM = """
import json, os, signal, sys, time
from pathlib import Path
from qvm_quiesce.attach import attach
from qvm_quiesce.cli import _end
from qvm_quiesce.guard import Guard
from qvm_quiesce.simulated import adopt
from qvm_quiesce.subject import Policy

values, fds, state = json.loads(sys.argv[1])
devices = [adopt(dict(each), own) for each, own in zip(values, fds)]
policy = Policy(drain_deadline=0.1, reset_deadline=0.3, watch=0.1)
guard = Guard.start("vm", [(device, attach(device), policy) for device in devices], Path(state))
for device in devices:
    device.start()
print(guard.pid, flush=True)
line = sys.stdin.readline().strip()
exec(line)
"""


def wait_for(holds: Callable[[], bool], what: str, limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {limit:g} s"
        time.sleep(0.005)


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Vm:
    """The VM process and its devices, which live on in this process: it is the hardware."""

    def __init__(self, state: Path, *faults: Faults) -> None:
        self.devices = [shared(f"0000:0{n}:00.0", fault) for n, fault in enumerate(faults, 1)]
        handovers = [device.handover() for device in self.devices]
        text = json.dumps([[each.values for each in handovers], [each.fds for each in handovers], str(state)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", VM, text],
            pass_fds=[fd for each in handovers for fd in each.fds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.guard = int(self.process.stdout.readline())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        wait_for(lambda: all(device.written for device in self.devices), "DMA")

    def _live(self) -> None:
        while not self._stop.wait(0.001):
            for device in self.devices:
                device.tick()

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        wait_for(lambda: not running(self.guard) or bool(files.quarantined()), "the guard's end")
        if running(self.guard):
            os.kill(self.guard, signal.SIGTERM)
        self._stop.set()
        self._thread.join()
        for device in self.devices:
            for fd in device.handover().fds:
                os.close(fd)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return files.folder()


Start = Callable[..., Vm]


@pytest.fixture
def start(state: Path) -> Iterator[Start]:
    machines: list[Vm] = []

    def begin(*faults: Faults) -> Vm:
        machines.append(Vm(state, *(faults or (Faults(), Faults()))))
        return machines[-1]

    yield begin
    for machine in machines:
        machine.close()


def record(state: Path) -> dict[str, object]:
    wait_for(lambda: any(files.records(state)), "the record")
    body = next(files.records(state))[1]
    assert body is not None, "the record is damaged"
    return body


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os._exit(0)",
        "os.abort()",
        "os.execv('/bin/true', ['true'])",
        "raise SystemExit",
        "guard._channel.close(); time.sleep(60)",
    ],
)
def test_whatever_ends_the_vm_the_guard_quiesces(start: Start, state: Path, end: str) -> None:
    vm = start()
    vm.order(end)
    wait_for(lambda: not any(device.running for device in vm.devices), "bus mastering off")
    body = record(state)
    assert (body["by"], body["verdict"], body["cause"]) == ("guard", "QUIESCED", "the VM process is gone")
    devices = body["devices"]
    assert isinstance(devices, list)
    # Bus mastering goes first when nobody is left, and before that when somebody is about to go.
    order = [[step["step"] for step in each["steps"] if step["step"] != "cut"] for each in devices]
    assert [each[0] for each in order] == ["bus-master-off"] * 2
    wait_for(lambda: not running(vm.guard), "the guard's end")
    assert all(device.done["closed"] and device.done["unmapped"] for device in vm.devices)
    written = [device.written for device in vm.devices]
    time.sleep(0.05)
    assert [device.written for device in vm.devices] == written


#: The thread with the lifeline dies, and no other does: so a process looks whose memory is being freed.
DYING = "guard._lifeline._mutex.unlock = lambda: 0; guard._lifeline._over.set(); time.sleep(0.3);"


@pytest.mark.parametrize(
    "then",
    ["time.sleep(60)", "[device.start() for device in devices]; os.kill(os.getpid(), signal.SIGKILL)"],
    ids=["lingers", "undoes it"],
)
def test_bus_mastering_goes_off_when_the_vm_begins_to_die(start: Start, state: Path, then: str) -> None:
    """And again when it is dead: one of its threads may have been inside an access."""
    vm = start()
    vm.order(DYING + then)
    wait_for(lambda: not any(device.running for device in vm.devices), "bus mastering off")
    body = record(state)
    assert body["verdict"] == "QUIESCED"
    devices = body["devices"]
    assert isinstance(devices, list)
    for device in devices:
        steps = {step["step"]: step for step in device["steps"]}
        assert list(steps)[:2] == ["cut", "bus-master-off"]
        # Bits of the command register: it was on, is off; and was on again if somebody did that.
        assert steps["cut"]["read"] == ["command=0x0006", "command=0x0002"]
        assert steps["bus-master-off"]["at"] > 0.1
        assert (steps["bus-master-off"]["read"][0] == "command=0x0006") == ("start" in then)
    assert not any(device.running for device in vm.devices)


def test_a_vm_that_did_its_own_part_leaves_the_guard_nothing_to_do(start: Start, state: Path) -> None:
    vm = start()
    vm.order("guard.dismiss()")
    vm.process.wait(20)
    wait_for(lambda: not running(vm.guard), "the guard's end")
    assert not list(files.records(state))
    # The simulated devices were not touched: in this test nobody has quiesced them.
    assert all(device.running for device in vm.devices)


def test_a_device_that_cannot_be_proven_quiet_keeps_its_memory(start: Start, state: Path) -> None:
    vm = start(Faults(), Faults(masters_in_secret=True))
    vm.order("os.kill(os.getpid(), signal.SIGKILL)")
    body = record(state)
    assert body["verdict"] == "QUARANTINED"
    wait_for(lambda: bool(files.quarantined(state)), "the quarantine")
    assert list(files.quarantined(state)) == ["0000:02:00.0"]
    entry = files.quarantined(state)["0000:02:00.0"]
    assert "memory of the guest changed" in entry["reason"]
    assert entry["keeper"] == vm.guard
    wait_for(lambda: vm.devices[1].done["surrendered"], "the kernel's turn")
    good, bad = vm.devices
    assert good.done["closed"] and not bad.done["closed"]
    assert not bad.done["unmapped"]
    assert running(vm.guard), "somebody has to hold the memory"
    pidfd = os.pidfd_open(vm.guard)
    assert _end(pidfd), "the keeper goes when it is told"
    os.close(pidfd)


def test_signals_of_the_terminal_do_not_reach_the_guard(start: Start) -> None:
    vm = start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(vm.guard, number)
    time.sleep(0.05)
    assert running(vm.guard)
    assert os.getsid(vm.guard) != os.getsid(vm.process.pid)


def test_a_lost_guard_is_noticed(state: Path) -> None:
    device = shared("0000:01:00.0")
    guard = Guard.start("vm", [(device, attach(device), Policy())], state)
    lost = threading.Event()
    guard.watch(lambda status: lost.set())
    os.kill(guard.pid, signal.SIGKILL)
    assert lost.wait(10)
    guard.dismiss()


def test_a_guard_that_cannot_take_the_devices_over_says_why(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = shared("0000:01:00.0")
    handover = device.handover()
    monkeypatch.setattr(device, "handover", lambda: handover._replace(adopt="qvm_quiesce.simulated:nobody"))
    with pytest.raises(GuardError, match="has no attribute 'nobody'"):
        Guard.start("vm", [(device, attach(device), Policy())], state)


def test_the_guard_is_small(state: Path) -> None:
    """It holds nothing of qvm's core, and memory in megabytes that a container does not notice."""
    device = shared("0000:01:00.0")
    guard = Guard.start("vm", [(device, attach(device), Policy())], state)
    try:
        status = Path(f"/proc/{guard.pid}/status").read_text()
        kib = int(status.split("VmRSS:")[1].split()[0])
        maps = Path(f"/proc/{guard.pid}/maps").read_text()
    finally:
        guard.dismiss()
    assert kib < 25 * 1024
    assert "msgspec" not in maps


def test_adopting_sees_the_same_device() -> None:
    device = shared("0000:01:00.0")
    handover = device.handover()
    other = adopt(dict(handover.values), handover.fds)
    device.start()
    assert other.running
    assert isinstance(other, SimulatedDevice)
