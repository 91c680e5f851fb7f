"""Simulated devices with the faults of real ones: what is done, what is found, what is concluded."""

from __future__ import annotations

import math
import threading
import time

import pytest
from qvm_quiesce import pci
from qvm_quiesce.attach import AttachRecord, attach
from qvm_quiesce.clock import RealClock
from qvm_quiesce.evidence import DeviceEvidence, Verdict, checksum, table
from qvm_quiesce.hardware import HardwareError
from qvm_quiesce.runner import Quiesce
from qvm_quiesce.simulated import MSIX_AT, NVME_CC, PM_AT, FakeClock, Faults, SimulatedDevice
from qvm_quiesce.subject import Policy


def quiesced(device: SimulatedDevice, policy: Policy | None = None) -> tuple[DeviceEvidence, Quiesce]:
    """Attach, start, let it work, and quiesce it."""
    record = attach(device)
    device.start()
    device.clock.sleep(0.01)
    quiesce = Quiesce("vm", "test", [(device, record, policy or Policy())], device.clock)
    quiesce.stop_dma("the test ends it")
    quiesce.prove()
    return quiesce.evidence.devices[0], quiesce


def verdicts(device: DeviceEvidence) -> dict[str, str]:
    return {step.step: step.verdict for step in device.steps}


def settle(device: SimulatedDevice) -> None:
    """After the verdict: nothing may come any more."""
    written, interrupts = device.written, device.interrupts()
    device.clock.sleep(5)
    assert (device.written, device.interrupts()) == (written, interrupts)


def test_a_good_device_is_quiesced_and_stays_quiet() -> None:
    device = SimulatedDevice()
    evidence, quiesce = quiesced(device)
    assert device.written > 0, "it was at work"
    assert evidence.verdict is Verdict.QUIESCED
    assert verdicts(evidence) == {
        "revoke": "ok", "soft-stop": "skipped", "bus-master-off": "ok", "mask-interrupts": "ok",
        "decode-off": "ok", "drain": "ok", "wake": "ok", "reset": "ok", "verify": "ok", "unmap": "ok",
        "restore": "ok",
    }  # fmt: skip
    taken = {name for name, done in device.done.items() if done}
    assert taken == {"revoked", "unmapped", "dropped", "reset"}
    settle(device)
    assert quiesce.evidence.verdict is Verdict.QUIESCED


def test_the_order_is_bus_mastering_first_and_memory_last() -> None:
    order: list[str] = []

    class Watched(SimulatedDevice):
        def config_write(self, offset: int, size: int, value: int) -> None:
            if offset == pci.COMMAND and self.running and not value & pci.COMMAND_BUS_MASTER:
                order.append("bus-master-off")
            super().config_write(offset, size, value)

        def reset(self, method: str) -> None:
            order.append("reset")
            super().reset(method)

        def unmap_dma(self) -> None:
            order.append("unmap")
            super().unmap_dma()

    quiesced(Watched())
    assert order == ["bus-master-off", "reset", "unmap"]


@pytest.mark.parametrize(
    ("faults", "verdict", "failed"),
    [
        (Faults(pending=0.3), Verdict.QUIESCED, set()),
        (Faults(pending=math.inf), Verdict.DEGRADED, {"drain"}),
        (Faults(reset_takes=0.25), Verdict.QUIESCED, set()),
        (Faults(reset_takes=45.0), Verdict.QUIESCED, set()),
        (Faults(reset_takes=math.inf), Verdict.QUARANTINED, {"reset", "verify", "restore"}),
        (Faults(reset_restores_mastering=True), Verdict.QUIESCED, set()),
        (Faults(dma_after_reset=True), Verdict.QUIESCED, set()),
        (Faults(sleeps=True), Verdict.QUIESCED, set()),
        (Faults(storms=True), Verdict.QUARANTINED, {"verify"}),
        (Faults(masters_in_secret=True), Verdict.QUARANTINED, {"verify"}),
    ],
    ids=repr,
)
def test_each_fault_gets_its_verdict(faults: Faults, verdict: Verdict, failed: set[str]) -> None:
    device = SimulatedDevice(faults=faults)
    began = time.monotonic()
    evidence, _ = quiesced(device)
    assert (evidence.verdict, {s.step for s in evidence.steps if s.verdict in ("failed", "late")}) == (
        verdict,
        failed,
    ), table([evidence])
    assert time.monotonic() - began < 20, "time is simulated"
    if verdict is not Verdict.QUARANTINED:
        settle(device)
        assert device.done["unmapped"]
    else:
        assert evidence.reason
        assert not device.done["unmapped"], "its memory must stay: it may still write to it"


def test_a_device_whose_bus_mastering_cannot_be_cleared_is_still_reset() -> None:
    """The reset is the stronger step, and it helps: the device starts again without bus mastering."""
    device = SimulatedDevice()
    record = attach(device)
    device.faults = Faults(ignores_bus_master_off=True)
    device.start()
    quiesce = Quiesce("vm", "test", [(device, record, Policy())], device.clock)
    quiesce.stop_dma("end")
    assert quiesce.prove() is Verdict.DEGRADED
    steps = verdicts(quiesce.evidence.devices[0])
    assert steps["bus-master-off"] == "failed"
    assert steps["reset"] == steps["verify"] == "ok"


def test_without_a_reset_it_is_quarantined() -> None:
    device = SimulatedDevice(resets=())
    record = attach(device)
    device.faults = Faults(ignores_bus_master_off=True)
    device.start()
    quiesce = Quiesce("vm", "test", [(device, record, Policy())], device.clock)
    quiesce.stop_dma("end")
    assert quiesce.prove() is Verdict.QUARANTINED
    assert not device.done["unmapped"]


def test_a_device_that_was_pulled_out_is_not_believed() -> None:
    device = SimulatedDevice()
    record = attach(device)
    device.start()
    device.faults = Faults(gone=True)
    quiesce = Quiesce("vm", "test", [(device, record, Policy())], device.clock)
    quiesce.stop_dma("end")
    assert quiesce.prove() is Verdict.QUARANTINED
    assert "all ones" in quiesce.evidence.devices[0].reason


def test_nvme_is_disabled_before_its_reset_and_so_does_not_freeze() -> None:
    device = SimulatedDevice(nvme=True, faults=Faults(freezes_unless_disabled=True))
    evidence, _ = quiesced(device)
    assert evidence.verdict is Verdict.QUIESCED
    soft = evidence.steps[1]
    assert (soft.step, soft.verdict, soft.detail) == ("soft-stop", "ok", "nvme")
    assert "CC=0x00000000" in soft.wrote
    assert "CSTS=0x00000000" in soft.read


def test_the_same_drive_without_a_soft_stop_is_lost() -> None:
    """The fault is real: without the step the verdict is another."""
    device = SimulatedDevice(nvme=True, faults=Faults(freezes_unless_disabled=True))
    evidence, _ = quiesced(device, Policy(soft_stop="none"))
    assert evidence.verdict is Verdict.QUARANTINED


def test_a_register_script_stops_a_device_nobody_knows() -> None:
    device = SimulatedDevice()
    script = (
        {"bar": 0, "offset": NVME_CC, "mask": 0x1, "write": 0},
        {"bar": 0, "offset": NVME_CC, "mask": 0x1, "equals": 0, "within": 0.1},
    )
    evidence, _ = quiesced(device, Policy(script=script))
    assert evidence.verdict is Verdict.QUIESCED
    assert verdicts(evidence)["soft-stop"] == "ok"


def test_a_script_that_waits_in_vain_only_degrades() -> None:
    device = SimulatedDevice()
    script = ({"offset": NVME_CC, "equals": 7, "within": 0.1},)
    evidence, _ = quiesced(device, Policy(script=script))
    assert (evidence.verdict, verdicts(evidence)["soft-stop"]) == (Verdict.DEGRADED, "failed")
    assert "soft-stop" in evidence.reason


def test_resets_are_tried_in_order_until_one_works() -> None:
    class Stubborn(SimulatedDevice):
        def reset(self, method: str) -> None:
            if method == "flr":
                raise HardwareError("no such luck")
            super().reset(method)

    device = Stubborn(resets=("flr", "bus"))
    evidence, _ = quiesced(device)
    assert evidence.verdict is Verdict.QUIESCED
    reset = next(step for step in evidence.steps if step.step == "reset")
    assert reset.detail == "flr: no such luck; reset by bus"


def test_attach_clears_bus_mastering_before_it_records() -> None:
    device = SimulatedDevice()
    device.start()
    record = attach(device)
    assert not device.running
    assert not record.command & pci.COMMAND_BUS_MASTER
    assert record.capabilities[pci.CAP_MSIX] == MSIX_AT
    assert AttachRecord.from_json(record.to_json()) == record


def test_attach_refuses_what_does_not_answer() -> None:
    with pytest.raises(HardwareError, match="all ones"):
        attach(SimulatedDevice(faults=Faults(gone=True)))


def test_the_configuration_is_restored_to_the_attach_record_not_to_the_guests() -> None:
    device = SimulatedDevice()
    record = attach(device)
    device.start()
    device.config_write(pci.BAR0, 4, 0x1234_5000)
    device.config_write(0x3C, 1, 99)
    quiesce = Quiesce("vm", "test", [(device, record, Policy(reset="none"))], device.clock)
    quiesce.stop_dma("end")
    quiesce.prove()
    assert device.config_read(pci.BAR0, 4) == 0xFEB0_0000
    assert device.config_read(0x3C, 1) == 0


def test_steps_run_once_whoever_calls_again() -> None:
    device = SimulatedDevice()
    evidence, quiesce = quiesced(device)
    count = len(evidence.steps)
    quiesce.stop_dma("again")
    quiesce.prove()
    assert len(evidence.steps) == count


def test_the_evidence_is_json_with_a_checksum_that_shows_damage() -> None:
    _, quiesce = quiesced(SimulatedDevice())
    body = quiesce.evidence.to_json()
    assert body["verdict"] == "QUIESCED"
    assert body["sha256"] == checksum(body)
    body["devices"][0]["verdict"] = "QUARANTINED"
    assert body["sha256"] != checksum(body)


@pytest.mark.parametrize("where", ["config", "reset", "bar"])
def test_a_device_that_hangs_in_the_kernel_holds_up_nobody(where: str) -> None:
    """Real threads: the hanging one is left behind, the others are proven quiet in their own time."""
    clock = RealClock()
    good = [SimulatedDevice(f"good{n}", clock=clock) for n in range(3)]
    bad = SimulatedDevice("bad", clock=clock, nvme=True)
    records = [attach(device) for device in (*good, bad)]
    for device in (*good, bad):
        device.start()
    bad.faults = Faults(hangs_in=where)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.001):
            for device in good:
                device.tick()

    hardware = threading.Thread(target=live, daemon=True)
    hardware.start()
    policy = Policy(soft_stop_deadline=0.1, drain_deadline=0.1, reset_deadline=0.2, watch=0.01)
    subjects = zip((*good, bad), records, strict=True)
    quiesce = Quiesce("vm", "test", [(d, r, policy) for d, r in subjects], clock)
    quiesce.stop_dma("end")
    assert not any(device.running for device in good)
    quiesce.prove()
    stop.set()
    found = {each.device: each.verdict for each in quiesce.evidence.devices}
    assert found == {
        "good0": Verdict.QUIESCED, "good1": Verdict.QUIESCED, "good2": Verdict.QUIESCED,
        "bad": Verdict.QUARANTINED,
    }  # fmt: skip


def test_a_sleeping_device_is_woken_and_caught() -> None:
    device = SimulatedDevice(faults=Faults(sleeps=True))
    evidence, _ = quiesced(device)
    wake = next(step for step in evidence.steps if step.step == "wake")
    assert wake.verdict == "ok"
    assert device.config_read(PM_AT + pci.PM_CONTROL, 2) & pci.PM_STATE == 0
    assert not device.running
    assert isinstance(device.clock, FakeClock)
