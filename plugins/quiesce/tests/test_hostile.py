"""What a device, or the host, does at the worst moment: late threads, silence, registers that come back."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from qvm_quiesce import pci, steps
from qvm_quiesce.attach import attach
from qvm_quiesce.clock import RealClock
from qvm_quiesce.evidence import DeviceEvidence, StepEvidence, Verdict
from qvm_quiesce.hardware import HardwareError
from qvm_quiesce.runner import GRACE, Quiesce, bound
from qvm_quiesce.simulated import MSI_AT, Faults, SimulatedDevice
from qvm_quiesce.softstop.script import problem
from qvm_quiesce.subject import Policy

QUICK = Policy(soft_stop_deadline=0.05, drain_deadline=0.1, reset_deadline=0.2, watch=0.01)


def quiesced(device: SimulatedDevice, policy: Policy = QUICK, *, at_once: bool = False) -> DeviceEvidence:
    record = attach(device)
    device.start()
    quiesce = Quiesce("vm", "test", [(device, record, policy)], device.clock)
    quiesce.stop_dma("end", at_once=at_once)
    quiesce.prove()
    return quiesce.evidence.devices[0]


def step(device: DeviceEvidence, name: str) -> StepEvidence:
    return next(each for each in device.steps if each.step == name)


class Stuck(SimulatedDevice):
    """Its first access to a BAR hangs until ``wake``; it remembers what reaches it afterwards."""

    def __init__(self) -> None:
        super().__init__(clock=RealClock(), nvme=True)
        self.wake = threading.Event()
        self.woken = threading.Event()
        self.accesses: list[str] = []

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.wake.wait(30)
        self.woken.set()
        return super().bar_read(bar, offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.accesses.append(f"{offset:#x}={value:#x}")


def test_a_thread_that_wakes_up_after_its_step_was_abandoned_touches_nothing() -> None:
    device = Stuck()
    found = quiesced(device)
    before = repr(found)
    assert found.verdict is Verdict.QUARANTINED
    device.wake.set()
    assert device.woken.wait(10)
    limit = time.monotonic() + 10
    while any("soft-stop" in each.name for each in threading.enumerate()) and time.monotonic() < limit:
        time.sleep(0.005)
    assert device.accesses == [], "it would have written CC now, to a device somebody else may have"
    assert repr(found) == before, "nor does it write into the record"


def test_bus_mastering_goes_off_though_the_soft_stop_never_came_back() -> None:
    device = Stuck()
    found = quiesced(device)
    device.wake.set()
    assert not device.running
    assert (step(found, "soft-stop").verdict, step(found, "bus-master-off").verdict) == ("late", "ok")
    assert step(found, "mask-interrupts").verdict == "ok"
    assert step(found, "reset").verdict == "skipped", "it may take a minute, and DMA is off"
    assert (step(found, "unmap").verdict, device.done["unmapped"]) == ("skipped", False)


def test_a_lost_device_whose_bus_mastering_stays_on_is_reset_all_the_same() -> None:
    device = Stuck()
    record = attach(device)
    device.start()
    device.faults = Faults(ignores_bus_master_off=True)
    quiesce = Quiesce("vm", "test", [(device, record, QUICK)], device.clock)
    quiesce.stop_dma("end")
    assert device.running
    assert quiesce.prove() is Verdict.QUARANTINED
    device.wake.set()
    assert device.done["reset"] and not device.running


def test_without_threads_the_steps_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert quiesced(SimulatedDevice(clock=RealClock())).verdict is Verdict.QUIESCED


def test_the_reason_is_what_failed_not_what_was_proven_before() -> None:
    class Kept(SimulatedDevice):
        def unmap_dma(self) -> None:
            raise HardwareError("the IOMMU is busy")

    found = quiesced(Kept())
    assert (found.verdict, found.reason) == (Verdict.QUARANTINED, "the IOMMU is busy")


def test_bus_mastering_that_comes_back_at_the_very_end_is_seen() -> None:
    class Undead(SimulatedDevice):
        def unmap_dma(self) -> None:
            super().unmap_dma()
            self.faults = Faults(ignores_bus_master_off=True)
            self._put(pci.COMMAND, 2, pci.COMMAND_BUS_MASTER)

    found = quiesced(Undead())
    assert (found.verdict, found.reason) == (Verdict.QUARANTINED, "bus mastering came back")


def test_a_function_without_an_interrupt_pin_may_have_no_bit_for_it() -> None:
    class Virtual(SimulatedDevice):
        """Command bit 10 is wired to 0, as that of an SR-IOV virtual function."""

        def _power_on(self) -> None:
            super()._power_on()
            self._put(pci.INTERRUPT_PIN, 1, 0)

        def _write_command(self, value: int) -> None:
            super()._write_command(value & ~pci.COMMAND_INTX_DISABLE)

    assert quiesced(Virtual()).verdict is Verdict.QUIESCED


def test_intx_that_cannot_be_turned_off_is_told() -> None:
    class Loud(SimulatedDevice):
        def _write_command(self, value: int) -> None:
            super()._write_command(value & ~pci.COMMAND_INTX_DISABLE)

    found = quiesced(Loud())
    assert (found.verdict, step(found, "mask-interrupts").detail) == (
        Verdict.DEGRADED,
        "still enabled: INTx",
    )


def test_the_host_lets_go_of_the_interrupts_of_a_device_that_is_gone() -> None:
    device = SimulatedDevice()
    record = attach(device)
    device.faults = Faults(gone=True)
    quiesce = Quiesce("vm", "test", [(device, record, QUICK)], device.clock)
    quiesce.stop_dma("end")
    assert quiesce.prove() is Verdict.QUARANTINED
    assert device.done["dropped"]


def test_msi_that_a_reset_brings_back_goes_off_before_the_proof() -> None:
    class Restored(SimulatedDevice):
        def reset(self, method: str) -> None:
            super().reset(method)
            self._put(MSI_AT + pci.MSI_CONTROL, 2, pci.MSI_ENABLE)

    device = Restored()
    found = quiesced(device)
    assert found.verdict is Verdict.QUIESCED
    assert not device.config_read(MSI_AT + pci.MSI_CONTROL, 2) & pci.MSI_ENABLE
    assert "msi=0x0000" in step(found, "verify").wrote


def test_a_device_in_the_reset_that_a_dead_vm_began_is_waited_for() -> None:
    device = SimulatedDevice(faults=Faults(reset_takes=0.1))
    record = attach(device)
    device.start()
    device.reset("flr")
    quiesce = Quiesce("vm", "guard", [(device, record, QUICK)], device.clock)
    quiesce.stop_dma("the VM process is gone", at_once=True)
    assert quiesce.prove() is Verdict.QUIESCED


def test_a_register_that_does_not_take_its_old_value_again_is_told() -> None:
    class Sticky(SimulatedDevice):
        def config_write(self, offset: int, size: int, value: int) -> None:
            if offset != pci.BAR0:
                super().config_write(offset, size, value)

        def _power_on(self) -> None:
            super()._power_on()
            if self.done["reset"]:
                self._put(pci.BAR0, 4, 0xDEAD_0000)

    device = Sticky()
    record = attach(device)
    device.start()
    device.reset("flr")
    quiesce = Quiesce("vm", "test", [(device, record, QUICK)], device.clock)
    quiesce.stop_dma("end")
    assert quiesce.prove() is Verdict.DEGRADED
    assert "config+0x10" in step(quiesce.evidence.devices[0], "restore").detail


def test_deadlines_of_devices_add_up_step_by_step() -> None:
    """One device drains for long, another one resets for long: both waits are all devices' waits."""
    slow_drain, slow_reset = Policy(drain_deadline=30, reset_deadline=1), Policy(reset_deadline=40)
    together = bound(steps.MASK_AND_RESET, [slow_drain, slow_reset])
    assert together >= 30 + 40
    assert bound(steps.MASK_AND_RESET, [slow_drain]) < together
    fixed = bound(steps.STOP_DMA, [QUICK])
    assert fixed == pytest.approx(1.0 + 0.05 + 0.5 + 2.0 + 3 * GRACE)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"offset": "0x10", "write": 0}, "offset: expected a number, not '0x10'"),
        ({"offset": True, "write": 0}, "offset: expected a number, not True"),
        ({"offset": 0, "write": 0, "size": 4.0}, "size: expected a number"),
        ({"offset": 0, "equals": 0, "within": "1s"}, "within: expected a number"),
        ({"offset": 0, "equals": 0, "within": -1}, "within is more than 0"),
        ({"offset": 0, "equals": 0, "within": float("nan")}, "within is more than 0"),
        ({"offset": -4, "write": 0}, "offset not negative"),
    ],
)
def test_a_wrong_script_is_told_in_words(entry: dict[str, Any], message: str) -> None:
    assert message in problem(entry)


def test_a_right_script_has_no_problem() -> None:
    assert problem({"bar": 0, "offset": 0, "mask": 1, "equals": 1, "within": 0.5, "size": 8}) == ""
