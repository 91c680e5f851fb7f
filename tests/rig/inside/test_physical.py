"""Physical devices that write to memory all the time: what stops them, what does not, and the proof.

Real VFIO of the machine's kernel; the devices and the IOMMU are QEMU's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from qvm_quiesce import pci
from qvm_quiesce.evidence import Verdict, text_table
from qvm_quiesce.runner import Quiesce
from qvm_vfio.device import VfioDevice
from qvm_vfio.kernel import Kernel

from tests.rig.inside.devices import bound, masters
from tests.rig.inside.physical import (
    KINDS,
    Faults,
    Frames,
    Owner,
    Taken,
    assert_unchanged,
    changes,
    until_all_write,
)
from tests.rig.inside.vfio_owner import POLICY, Memory, wait_for

CONTINUOUS = ("e1000e", "slow")


@pytest.fixture(scope="module", autouse=True)
def frames() -> Iterator[None]:
    """They come all the time."""
    sender = Frames()
    yield
    sender.close()


@pytest.fixture
def faults() -> Iterator[Faults]:
    listener = Faults()
    yield listener
    listener.close()


@pytest.fixture
def take() -> Iterator[Any]:
    """``take(kind)``: one of the devices, at work and stepped until it wrote, in this process."""
    taken = []

    def begin(kind: str, *, work: bool = True) -> Taken:
        taken.append(Taken(kind, bound(kind), Memory(), work=work))
        return taken[-1]

    yield begin
    for each in taken:
        each.hardware.close()


@pytest.fixture
def owner() -> Iterator[Any]:
    """``owner(kinds, ...)``: see Owner."""
    owners = []

    def begin(*words: Any, **options: Any) -> Owner:
        owners.append(Owner(*words, **options))
        return owners[-1]

    yield begin
    for each in owners:
        each.close()


def set_mastering(taken: Taken, on: bool) -> None:
    taken.hardware.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | (pci.COMMAND_BUS_MASTER if on else 0))


# -- what the kernel and the devices do ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_at_work_writes_and_a_second_owner_can_have_it(kind: str, take: Any) -> None:
    """The others mean something only if this is so."""
    for _ in range(2):
        taken = take(kind)
        until_all_write([taken])
        taken.hardware.close()


@pytest.mark.parametrize("kind", ["edu", "e1000e"])
def test_bus_mastering_off_stops_writes_at_once(kind: str, take: Any) -> None:
    taken = take(kind)
    until_all_write([taken])
    began = time.perf_counter()
    set_mastering(taken, False)
    print(f"{kind}: bus mastering off in {(time.perf_counter() - began) * 1e3:.2f} ms")
    assert_unchanged(taken.memory)
    set_mastering(taken, True)
    until_all_write([taken])


def test_bus_mastering_off_does_not_stop_reads_that_the_nvme_has_taken(take: Any) -> None:
    """Of this emulated drive: memory is looked up when it takes a request. Its reset ends them."""
    taken = take("slow")
    until_all_write([taken])
    set_mastering(taken, False)
    print(f"slow: memory changed after bus mastering went off: {changes(taken.memory)}")
    taken.hardware.reset(taken.hardware.resets[0])
    assert_unchanged(taken.memory)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_alone_leaves_bus_mastering_on(kind: str, take: Any) -> None:
    taken = take(kind)
    until_all_write([taken])
    began = time.perf_counter()
    taken.hardware.device.reset()
    took = time.perf_counter() - began
    assert taken.hardware.config_read(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER
    assert masters(kind)
    goes_on = changes(taken.memory)
    print(f"{kind}: offers {taken.hardware.resets}; reset in {took * 1e3:.0f} ms, writes go on: {goes_on}")
    if kind == "e1000e":
        assert goes_on, "its reset by power management changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_memory_taken_from_a_device_at_work_shows_as_faults(kind: str, take: Any, faults: Faults) -> None:
    """That is why it is taken away only after the proof; and the faults can be seen."""
    taken = take(kind)
    until_all_write([taken])
    faults.lines()
    taken.hardware.unmap_dma()
    if kind == "slow":
        taken.hardware.bar_write(0, 0x1000, 4, 1)  # it must fetch a command: what it has taken it can do
    wait_for(lambda: any(bound(kind)[5:] in line for line in faults.lines()), "a fault of the IOMMU")


def test_an_owner_killed_while_nobody_else_holds_its_devices(owner: Any, faults: Faults) -> None:
    """The kernel's own close path: neither guard nor anybody else is there."""
    them = owner(KINDS)
    assert [masters(kind) for kind in KINDS] == [True] * 3
    them.process.kill()
    them.process.wait()
    assert [masters(kind) for kind in KINDS] == [False] * 3
    assert_unchanged(*them.memory.values())
    print(f"faults: {faults.lines()}")


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_an_owner_killed_while_somebody_holds_the_device_s_descriptor(kind: str, owner: Any) -> None:
    """Nothing stops it: the danger that the guard is for."""
    them = owner([kind], share=True)
    them.process.kill()
    them.process.wait()
    memory = them.memory[kind]
    assert changes(memory), "DMA after the death of the owner"
    assert masters(kind)
    device = VfioDevice(Kernel(), bound(kind), them.fds.pop(kind))
    device.config_write(pci.COMMAND, 2, 0)
    device.reset()
    assert_unchanged(memory)
    device.close()


# -- quiescing -----------------------------------------------------------------------------------------


def test_devices_at_work_are_quiesced_together_and_go_to_a_second_owner(take: Any, faults: Faults) -> None:
    them = [take(kind) for kind in KINDS]
    until_all_write(them)
    work = Quiesce("rig", "vm", [(each.hardware, each.record, POLICY) for each in them])
    began = time.perf_counter()
    work.stop_dma("test")
    stopped = time.perf_counter()
    verdict = work.prove()
    print(f"stop_dma {(stopped - began) * 1e3:.0f} ms, prove {(time.perf_counter() - stopped) * 1e3:.0f} ms")
    print(text_table(work.evidence.devices))
    assert verdict is Verdict.QUIESCED, text_table(work.evidence.devices)
    assert_unchanged(*(each.memory for each in them))
    assert faults.lines() == []
    for each in them:
        # What the guest had set is gone: it is as it was attached.
        assert each.hardware.config_read(pci.COMMAND, 2) & ~pci.COMMAND_INTX_DISABLE == each.record.command
        each.hardware.close()
    again = [take(kind) for kind in KINDS]
    until_all_write(again)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_quiesced_without_a_soft_stop(kind: str, take: Any, faults: Faults) -> None:
    """What a guest did to its registers does not matter: bus mastering, reset, proof."""
    taken = take(kind)
    until_all_write([taken])
    policy = type(POLICY)(soft_stop="none", reset_deadline=20, watch=0.5)
    work = Quiesce("rig", "vm", [(taken.hardware, taken.record, policy)])
    work.stop_dma("test", at_once=True)
    assert work.prove() is Verdict.QUIESCED, text_table(work.evidence.devices)
    assert_unchanged(taken.memory)
    assert faults.lines() == []


class Deaf:
    """Hardware whose command register takes any value and has no effect, and that has no reset."""

    resets = ()

    def __init__(self, real: Any) -> None:
        self._real = real
        self._command = real.config_read(pci.COMMAND, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def config_read(self, offset: int, size: int) -> int:
        return self._command if offset == pci.COMMAND else int(self._real.config_read(offset, size))

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset == pci.COMMAND:
            self._command = value
        else:
            self._real.config_write(offset, size, value)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_a_device_that_goes_on_writing_is_not_called_quiet(kind: str, take: Any, faults: Faults) -> None:
    """All registers look right: memory is what gives it away. It keeps that memory, so nobody is hurt."""
    taken = take(kind)
    until_all_write([taken])
    policy = type(POLICY)(soft_stop="none", watch=0.5)
    work = Quiesce("rig", "vm", [(Deaf(taken.hardware), taken.record, policy)])
    work.stop_dma("test")
    assert work.prove() is Verdict.QUARANTINED
    assert work.evidence.devices[0].reason == "memory of the guest changed after bus mastering was turned off"
    assert changes(taken.memory)
    assert faults.lines() == []
