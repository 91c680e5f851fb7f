"""Guests on the emulated engine with a physical function of the rig's machine: every access is trapped.

The guest is another architecture than its host. The device is edu: registers, a computation, transfers that
take 100 ms, and INTx.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qvm_quiesce import state as files

from qvmcore import control
from tests.rig.inside import edu_guest, linux
from tests.rig.inside.conftest import finish, run_qvm
from tests.rig.inside.devices import bound, guard_s_record, masters, until_off
from tests.rig.inside.edu_guest import NOWHERE, Order, Ram, told
from tests.rig.inside.physical import WHILE, Faults
from tests.rig.inside.vfio_owner import wait_for

REQUIRE = "\n[safety]\nrequire-quiesce = true\n"
#: Seconds; a guest is here for five.
LIMIT = 90.0
#: INTA of the device number 1, at the controller of arm64-virt.
INTA = 36


class Guest:
    """A guest that has the edu device, and somebody who quiesces it."""

    def __init__(self, folder: Path, order: Order) -> None:
        passed = linux.vdev("pass", "edu", device=f"pci:{bound('edu')}") + linux.vdev("quiesce", "quiet")
        self._console = folder / "console"
        self.vm = run_qvm(edu_guest.machine(folder, order, REQUIRE + passed))

    @property
    def said(self) -> str:
        """What the guest has said so far."""
        return self._console.read_text() if self._console.exists() else ""

    def until_it_loops(self) -> Ram:
        """Wait until two transfers have come; the memory they go to."""

        def looping() -> bool:
            if self.vm.process.poll() is not None:
                pytest.fail(f"it ended with {self.vm.wait()}:\n{self.vm.text}{self.said}")
            return "looping\n" in self.said

        wait_for(looping, "transfers", LIMIT)
        return Ram(self.vm.process.pid)

    def end_quietly(self) -> None:
        """Wait until it has powered off; the exit code is 0, and the device is proven quiet."""
        assert self.vm.wait(LIMIT) == 0, self.vm.text + self.said
        assert "ended: guest-shutdown" in self.vm.text, self.vm.text
        assert "quiesce: QUIESCED" in self.vm.text
        assert not masters("edu")
        ((_, body),) = files.records()
        assert body is not None
        assert (body["by"], body["verdict"]) == ("vm", "QUIESCED"), body


Begin = Callable[[Order], Guest]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records and quarantine go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """``begin(order)`` starts a guest."""
    running: list[Guest] = []

    def start(order: Order) -> Guest:
        running.append(Guest(tmp_path, order))
        return running[-1]

    yield start
    for guest in running:
        finish(guest.vm)


@pytest.fixture
def faults() -> Iterator[Faults]:
    """What the IOMMU refuses from now on."""
    listener = Faults()
    yield listener
    listener.close()


def assert_nothing_arrives(ram: Ram) -> None:
    """In the time of ten transfers; the guest does not run any more."""
    ram.clear()
    before = bytes(ram.map)
    time.sleep(WHILE)
    assert not ram.written()
    assert bytes(ram.map) == before


def assert_everything_worked(said: str, line: int) -> None:
    """Of the order ONCE, with interrupts on ``line``. The guest has counted words of memory."""
    assert told(said) == {
        "device": 1,
        "size": 1 << 20,
        "id": 0x0100_00ED,
        "inverted": 0x1234_5678 ^ 0xFFFF_FFFF,
        "factorial": 3628800,
        "moved": edu_guest.SIZE // 4,
        "around": (0x3000 - edu_guest.SIZE) // 4,
        "unmastered": 0xA5A5_A5A5,
        "interrupts": 2,
        "line": line,
    }, said
    assert said.endswith("end\n")


def test_a_guest_drives_it_by_registers_dma_and_intx(begin: Begin, faults: Faults) -> None:
    """Its own BAR and its own memory, at addresses of its own; without bus mastering nothing comes."""
    guest = begin(Order.ONCE)
    guest.end_quietly()
    assert_everything_worked(guest.said, INTA)
    assert faults.lines() == []


def test_its_messages_come_by_the_frame_of_the_emulated_controller(begin: Begin) -> None:
    guest = begin(Order.MESSAGE)
    guest.end_quietly()
    assert_everything_worked(guest.said, edu_guest.MESSAGE)


def test_its_accesses_are_trapped_and_counted(begin: Begin) -> None:
    """Nothing is mapped: what the guest reads and writes while it loops comes to the vdev."""
    guest = begin(Order.LOOP)
    guest.until_it_loops()
    before = status(guest)
    # Four to begin a transfer, one to take its interrupt back.
    wait_for(lambda: bool(status(guest)["writes"] >= before["writes"] + 4 * 5), "four transfers")
    after = status(guest)
    assert after["id"] == "1234:11e8"
    assert after["reads"] >= before["reads"] + 3
    assert after["interrupts"] >= before["interrupts"] + 3
    assert after["direct"] == 0
    guest.vm.send(signal.SIGTERM)
    guest.end_quietly()
    assert after["failures"] == 0


def status(guest: Guest) -> dict[str, Any]:
    """What the vdev tells of itself."""
    report = control.ask(control.find(str(guest.vm.process.pid)))
    (vdev,) = [each for each in report["vdevs"] if each["name"] == "edu"]
    found: dict[str, Any] = vdev["status"]
    return found


def test_sigterm_is_the_power_button_and_the_pending_transfer_never_comes(begin: Begin) -> None:
    guest = begin(Order.LOOP)
    ram = guest.until_it_loops()
    guest.vm.send(signal.SIGTERM)
    guest.end_quietly()
    assert guest.said.endswith("looping\nbutton\n"), guest.said
    assert_nothing_arrives(ram)


def test_sigkill_in_the_middle_of_transfers_with_a_guard(begin: Begin) -> None:
    """The canary is the guest's memory: nothing comes once bus mastering is off. It is alive before."""
    guest = begin(Order.LOOP)
    ram = guest.until_it_loops()
    ram.clear()
    wait_for(ram.written, "a transfer")
    assert masters("edu")
    killed = time.monotonic()
    guest.vm.send(signal.SIGKILL)
    print(f"death to bus mastering off: {until_off('edu', killed):.1f} ms")
    assert_nothing_arrives(ram)
    assert guest.vm.wait(60) == -signal.SIGKILL
    guard_s_record()
    assert_nothing_arrives(ram)


def test_odd_sizes_and_places_harm_nobody(begin: Begin, faults: Faults) -> None:
    """Bytes and 8 bytes at once, before, across and behind the BAR, while it is closed, all of the
    configuration space overwritten, and a transfer to where the guest has no memory."""
    guest = begin(Order.ABUSE)
    guest.end_quietly()
    assert guest.said.endswith("alive\n"), guest.said
    found = told(guest.said)
    assert found["behind"] == found["across"] == found["closed"] == 0xFFFF_FFFF
    assert found["still"] == 0x11E8_1234
    assert (found["id"], found["factorial"]) == (0x0100_00ED, 3628800)
    refused = faults.lines()
    assert refused, "the transfer to nowhere"
    assert all(f"fault addr {NOWHERE:#x}" in line for line in refused), refused
