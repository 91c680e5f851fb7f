"""Guests on the emulated engine with a physical function of the rig's machine: every access is trapped.

The guest is another architecture than its host. The device is edu: registers, a computation, transfers that
take 100 ms, and INTx.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qvm_quiesce import state as files

from qvmcore import control
from tests.guest.conftest import Vm
from tests.rig.inside import edu_guest, linux
from tests.rig.inside.conftest import finish, run_qvm
from tests.rig.inside.devices import bound, guard_s_record, masters, until_off
from tests.rig.inside.edu_guest import NOWHERE, Order, Ram, told
from tests.rig.inside.physical import WHILE, Faults
from tests.rig.inside.vfio_owner import wait_for

REQUIRE = "\n[safety]\nrequire-quiesce = true\n"
Begin = Callable[[Order], Vm]
#: Seconds; a guest is here for five.
LIMIT = 90.0


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records and quarantine go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """``begin(order)`` starts a guest that has the edu device, and somebody who quiesces it."""
    running: list[Vm] = []

    def start(order: Order) -> Vm:
        passed = linux.vdev("pass", "edu", device=f"pci:{bound('edu')}") + linux.vdev("quiesce", "quiet")
        running.append(run_qvm(edu_guest.machine(tmp_path, order, REQUIRE + passed)))
        return running[-1]

    yield start
    for vm in running:
        finish(vm)


@pytest.fixture
def faults() -> Iterator[Faults]:
    """What the IOMMU refuses from now on."""
    listener = Faults()
    yield listener
    listener.close()


def ended_quietly(vm: Vm) -> None:
    """With 0 and the proof."""
    assert vm.wait(LIMIT) == 0, vm.text
    assert "ended: guest-shutdown" in vm.text, vm.text
    assert "quiesce: QUIESCED" in vm.text
    assert not masters("edu")
    ((_, body),) = files.records()
    assert body is not None
    assert (body["by"], body["verdict"]) == ("vm", "QUIESCED"), body


def assert_nothing_arrives(ram: Ram) -> None:
    """In the time of ten transfers; the guest does not run any more."""
    ram.clear()
    before = bytes(ram.map)
    time.sleep(WHILE)
    assert not ram.written()
    assert bytes(ram.map) == before


def test_a_guest_drives_it_by_registers_dma_and_intx(begin: Begin, faults: Faults) -> None:
    """Its own BAR and its own memory, at addresses of its own; without bus mastering nothing comes."""
    vm = begin(Order.ONCE)
    ended_quietly(vm)
    assert told(vm.text) == {
        "device": 1,
        "size": 1 << 20,
        "id": 0x0100_00ED,
        "inverted": 0x1234_5678 ^ 0xFFFF_FFFF,
        "factorial": 3628800,
        "moved": edu_guest.SIZE // 4,
        "around": (0x3000 - edu_guest.SIZE) // 4,
        "unmastered": 0xA5A5_A5A5,
        "interrupts": 2,
        "line": 36,
    }, vm.text
    assert faults.lines() == []


def test_its_accesses_are_trapped_and_counted(begin: Begin) -> None:
    vm = begin(Order.LOOP)
    vm.expect("looping\n", LIMIT)
    report = control.ask(control.find(str(vm.process.pid)))
    (vdev,) = [each for each in report["vdevs"] if each["name"] == "edu"]
    assert vdev["status"]["id"] == "1234:11e8"
    assert vdev["status"]["direct"] == 0
    assert vdev["status"]["writes"] > 8
    assert vdev["status"]["interrupts"] >= 2
    assert vdev["status"]["failures"] == 0


def test_sigterm_is_the_power_button_and_the_pending_transfer_never_comes(begin: Begin) -> None:
    vm = begin(Order.LOOP)
    vm.expect("looping\n", LIMIT)
    ram = Ram(vm.process.pid)
    vm.send(signal.SIGTERM)
    ended_quietly(vm)
    assert "button\n" in vm.text
    assert_nothing_arrives(ram)


def test_sigkill_in_the_middle_of_transfers_with_a_guard(begin: Begin) -> None:
    """The canary is the guest's memory: nothing comes once bus mastering is off. It is alive before."""
    vm = begin(Order.LOOP)
    vm.expect("looping\n", LIMIT)
    ram = Ram(vm.process.pid)
    ram.clear()
    wait_for(ram.written, "a transfer")
    assert masters("edu")
    killed = time.monotonic()
    vm.send(signal.SIGKILL)
    print(f"death to bus mastering off: {until_off('edu', killed):.1f} ms")
    assert_nothing_arrives(ram)
    assert vm.wait(60) == -signal.SIGKILL
    guard_s_record()
    assert_nothing_arrives(ram)


def test_odd_sizes_and_places_harm_nobody(begin: Begin, faults: Faults) -> None:
    """Bytes and 8 bytes at once, before, across and behind the BAR, while it is closed, all of the
    configuration space overwritten, and a transfer to where the guest has no memory."""
    vm = begin(Order.ABUSE)
    ended_quietly(vm)
    assert "alive\n" in vm.text
    found = told(vm.text)
    assert found["behind"] == found["across"] == found["closed"] == 0xFFFF_FFFF
    assert found["still"] == 0x11E8_1234
    assert (found["id"], found["factorial"]) == (0x0100_00ED, 3628800)
    refused = faults.lines()
    assert refused, "the transfer to nowhere"
    assert all(f"fault addr {NOWHERE:#x}" in line for line in refused), refused
