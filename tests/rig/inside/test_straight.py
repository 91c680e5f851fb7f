"""Interrupts of physical functions go from the kernel's VFIO to its KVM: none comes to this process.

edu has MSI and INTx, and a register that raises them; an NVMe drive has MSI-X and INTx.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qvm_pass.device import Pass
from qvm_quiesce import pci

from qvmcore import control
from qvmcore.testing.fakes import Plugged, plug
from tests.guest.conftest import Vm
from tests.rig.inside import linux
from tests.rig.inside.conftest import Start
from tests.rig.inside.counting_guest import LEVEL, MESSAGE, CountingGuest, Straight
from tests.rig.inside.devices import bound

COUNT = 200
#: Registers of edu: what it interrupts for, to raise some, to acknowledge them.
STATUS, RAISE, ACKNOWLEDGE = 0x24, 0x60, 0x64
ON = pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records and quarantine go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


class Edu:
    """The device in the hands of a driver, and the guest its interrupts come to."""

    def __init__(self, plugged: Plugged[Pass], guest: CountingGuest) -> None:
        assert plugged.device is not None
        assert plugged.pci is not None
        self.plugged, self.guest, self.device = plugged, guest, plugged.device
        plugged.pci.listening = Straight(guest.guest)
        guest.served = self._serve
        guest.start()
        plugged.vdev.on_starting()

    def _serve(self, _vector: int) -> None:
        self.register(ACKNOWLEDGE, self.plugged.read(STATUS))

    def register(self, at: int, value: int) -> None:
        self.plugged.write(at, value)

    def one_by_one(self, vector: int, begin: int = 0) -> None:
        for number in range(begin + 1, begin + COUNT + 1):
            self.register(RAISE, 1)
            assert self.guest.wait(vector, number), f"interrupt {number} was lost: {self.status}"
        assert self.guest.taken[vector] == begin + COUNT

    def msi(self, on: bool, *, mask: int = 0) -> None:
        at = {kind: at for at, kind in self.device.capabilities()}[pci.CAP_MSI]
        for register, value in ((4, 0xFEE0_0000), (8, 0), (12, MESSAGE), (16, mask)):
            self.device.write(at + register, value)
        self.device.write(at + pci.MSI_CONTROL, on * pci.MSI_ENABLE, 2)

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.plugged.vdev.status())


@pytest.fixture
def edu() -> Iterator[Edu]:
    guest = CountingGuest()
    with plug(Pass, {"device": f"pci:{bound('edu')}"}, start=False) as plugged:
        yield Edu(plugged, guest)
    guest.close()


def test_each_interrupt_by_intx_is_taken_and_ended_by_kvm(edu: Edu) -> None:
    edu.one_by_one(LEVEL)
    found = edu.status
    assert (found["kind"], found["straight"], found["interrupts"]) == ("INTx", 1, 0), found
    assert not edu.plugged.ctx.worker_alive


def test_each_interrupt_by_msi_is_taken_by_kvm(edu: Edu) -> None:
    edu.msi(True)
    edu.one_by_one(MESSAGE)
    found = edu.status
    assert (found["kind"], found["straight"], found["interrupts"]) == ("MSI", 1, 0), found
    assert not edu.plugged.ctx.worker_alive
    assert edu.guest.taken[LEVEL] == 0


def test_intx_works_again_after_msi_and_after_intx_disable(edu: Edu) -> None:
    edu.one_by_one(LEVEL)
    edu.msi(True)
    edu.one_by_one(MESSAGE)
    edu.msi(False)
    edu.one_by_one(LEVEL, COUNT)
    edu.device.write(pci.COMMAND, ON | pci.COMMAND_INTX_DISABLE, 2)
    edu.register(RAISE, 1)
    assert edu.device.read(pci.STATUS, 2) & pci.STATUS_INTERRUPT
    assert edu.guest.taken[LEVEL] == 2 * COUNT
    edu.device.write(pci.COMMAND, ON, 2)
    assert edu.guest.wait(LEVEL, 2 * COUNT + 1)


def test_a_masked_message_is_pending_and_comes_once(edu: Edu) -> None:
    edu.msi(True, mask=1)
    for _ in range(3):
        edu.register(RAISE, 1)
    at = {kind: at for at, kind in edu.device.capabilities()}[pci.CAP_MSI]
    assert edu.device.read(at + 20) == 1
    assert edu.guest.taken == {}
    edu.device.write(at + 16, 0)
    assert edu.guest.wait(MESSAGE, 1)
    edu.one_by_one(MESSAGE, 1)


@pytest.mark.parametrize("msi", [True, False])
def test_a_device_that_was_taken_away_interrupts_nobody_and_is_seen_to_try(edu: Edu, msi: bool) -> None:
    edu.msi(msi)
    edu.one_by_one(MESSAGE if msi else LEVEL)
    taken = edu.guest.taken.copy()
    (hardware,) = edu.plugged.vdev.hardware()
    hardware.revoke()
    before = hardware.interrupts()
    hardware.bar_write(0, RAISE, 4, 1)
    assert hardware.interrupts() == before + 1
    edu.msi(not msi)
    edu.msi(msi)
    hardware.drop_interrupts()
    hardware.bar_write(0, RAISE, 4, 1)
    assert hardware.interrupts() == before + 1
    hardware.bar_write(0, ACKNOWLEDGE, 4, 1)
    assert edu.guest.taken == taken


# -- Linux, with an NVMe drive ---------------------------------------------------------------------------

READ = "dd if=/dev/nvme0n1 of=/dev/null bs=4k count=2000 iflag=direct 2>/dev/null && echo read"


def report(vm: Vm) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the vdev says, and the engine."""
    found = control.ask(control.find(str(vm.process.pid)))
    (vdev,) = [each for each in found["vdevs"] if each["name"] == "drive"]
    return vdev["status"], found["guest"]["status"]


@pytest.mark.parametrize(
    ("cmdline", "kind", "which"), [("", "MSI-X", "plain"), ("pci=nomsi", "INTx", "line")]
)
def test_linux_reads_a_drive_and_no_interrupt_comes_to_us(
    start: Start, cmdline: str, kind: str, which: str
) -> None:
    """Two thousand reads, as many interrupts; registers are mapped, also with INTx."""
    vdevs = linux.vdev("pass", "drive", device=f"pci:{bound(which)}") + linux.vdev("quiesce", "quiet")
    vm = start(f"{READ}; grep nvme /proc/interrupts; sleep 5", vdevs, cmdline=cmdline)
    vm.expect("read\n")
    status, engine = report(vm)
    assert vm.wait() == 0, vm.text
    print(f"{kind}: {status}; irqfds {engine['irqfds']}, straight {engine['straight']}")
    assert status["kind"] == kind
    assert (status["interrupts"], status["watched"], status["reads"] + status["writes"]) == (0, 0, 0), status
    assert status["straight"] == engine["straight"] >= 1
    counts = re.findall(r"^ *\d+: +(\d+) .*nvme", vm.text, re.M)
    assert sum(map(int, counts)) >= 2000, vm.text
    assert "quiesce: QUIESCED" in vm.text
