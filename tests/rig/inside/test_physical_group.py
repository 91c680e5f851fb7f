"""Two functions of the machine in one IOMMU group, which the kernel opens once: at work, then quiesced."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qvm_quiesce import pci
from qvm_quiesce import state as files
from qvm_quiesce.evidence import Verdict, text_table
from qvm_quiesce.guard import Guard
from qvm_quiesce.runner import Quiesce
from qvm_vfio.errors import VfioError
from qvm_vfio.kernel import Kernel
from qvm_vfio.sysfs import PciFunction

from tests.rig.inside.drivers import Edu
from tests.rig.inside.physical import Faults, Taken, assert_unchanged, until_all_write
from tests.rig.inside.vfio_owner import POLICY, Memory, wait_for


class Other(Edu):
    """The second one's place in the memory of both."""

    PLACE = 0x8000


def names() -> list[str]:
    """The only device with two functions, bound to vfio-pci."""
    (second,) = [
        path.name for path in Path("/sys/bus/pci/devices").glob("*.1")
        if (path / "device").read_text().strip() == "0x11e8"
    ]  # fmt: skip
    found = [PciFunction(Kernel(), name) for name in (f"{second[:-1]}0", second)]
    for each in found:
        each.bind()
    assert found[0].group == found[1].group
    return [each.name for each in found]


def take(memory: Memory) -> list[Taken]:
    """Both, at work on one memory."""
    both = [Taken("edu", name, memory, work=False) for name in names()]
    for each, driver in zip(both, (Edu, Other), strict=True):
        each.kind = each.hardware.name
        each.driver = driver(each.hardware, memory)
    until_all_write(both)
    return both


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def both(memory: Memory) -> Iterator[list[Taken]]:
    taken = take(memory)
    yield taken
    for each in taken:
        each.hardware.close()


def mastering(taken: Taken) -> bool:
    return bool(taken.hardware.config_read(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER)


def test_both_are_quiesced_and_go_to_a_second_owner(memory: Memory, both: list[Taken]) -> None:
    faults = Faults()
    work = Quiesce("rig", "vm", [(each.hardware, each.record, POLICY) for each in both])
    work.stop_dma("test")
    assert work.prove() is Verdict.QUIESCED, text_table(work.evidence.devices)
    assert_unchanged(memory)
    assert faults.lines() == []
    faults.close()
    for each in both:
        each.hardware.close()
    for each in take(Memory()):
        each.hardware.close()


def test_the_memory_stays_for_the_one_that_is_still_at_work(memory: Memory, both: list[Taken]) -> None:
    faults = Faults()
    first, second = both
    first.hardware.config_write(pci.COMMAND, 2, 0)
    first.hardware.unmap_dma()
    first.hardware.close()
    until_all_write([second])
    assert faults.lines() == []
    second.hardware.config_write(pci.COMMAND, 2, 0)
    second.hardware.unmap_dma()
    faults.close()


def test_one_of_a_group_cannot_be_had_while_the_host_has_the_other() -> None:
    first, second = (PciFunction(Kernel(), name) for name in names())
    second.bind("")
    try:
        with pytest.raises(VfioError, match=f"{second.name} \\(no driver\\)"):
            first.check()
    finally:
        second.bind()
    assert first.check() == second.check()


def test_a_guard_takes_both_over(memory: Memory, both: list[Taken], tmp_path: Path) -> None:
    guard = Guard.start("rig", [(each.hardware, each.record, POLICY) for each in both], tmp_path)
    until_all_write(both)
    began = time.monotonic()
    guard._channel.close()
    wait_for(lambda: not any(mastering(each) for each in both), "bus mastering off")
    print(f"bus mastering of both off after {(time.monotonic() - began) * 1e3:.0f} ms")
    wait_for(lambda: any(files.records(tmp_path)), "the record")
    ((_, body),) = files.records(tmp_path)
    assert body is not None
    assert [each["verdict"] for each in body["devices"]] == ["QUIESCED"] * 2, body
    guard._process.wait(60)
    assert_unchanged(memory)
