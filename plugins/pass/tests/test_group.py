"""Two functions of one IOMMU group in one guest: one group and one address space for both."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qvm_pass.device import Pass
from qvm_quiesce import pci, plugin
from qvm_quiesce import state as files
from qvm_quiesce.attach import attach
from qvm_quiesce.guard import Guard
from qvm_quiesce.subject import Policy
from qvm_quiesce.vdev import QuiesceVdev
from qvm_vfio import space, structs
from qvm_vfio.errors import VfioError
from qvm_vfio.fake import FakeFunction, FakeKernel
from qvm_vfio.hardware import Ram, VfioHardware, adopt, open_device

from qvmcore import boards
from qvmcore.api import MemorySpec
from qvmcore.memory import MemoryRegion
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import machine

FIRST, SECOND = "0000:03:00.0", "0000:03:00.1"
RUNNING = pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER


class Other(Pass):
    """Another vdev of the same kind."""

    vdev_type = "other"


@pytest.fixture
def kernel(host: Any) -> FakeKernel:
    made: FakeKernel = host(FakeFunction(FIRST), FakeFunction(SECOND, vectors=2))
    return made


@pytest.fixture
def ram() -> Iterator[Ram]:
    region = MemoryRegion(MemorySpec(1 << 30, 1 << 20))
    yield Ram(region.start, region.size, region.fd, region.host_address, lambda: region.view)
    region.close()


@pytest.fixture
def both(kernel: FakeKernel, ram: Ram) -> Iterator[tuple[VfioHardware, VfioHardware]]:
    """Both with the memory mapped and mastering the bus."""
    opened = [open_device(name, kernel) for name in (FIRST, SECOND)]
    for each in opened:
        each.give_memory([ram])
        each.map_dma()
        each.config_write(pci.COMMAND, 2, RUNNING)
    yield opened[0], opened[1]
    for each in opened:
        each.close()
    assert not kernel.open_fds


def test_a_guest_with_two_functions_of_a_group_is_quiesced(tmp_path: Path, kernel: FakeKernel) -> None:
    seen: list[bool] = []

    def script(guest: ScriptedGuest) -> None:
        board = boards.get("arm64-virt").pci
        assert board is not None
        start = guest.config.memory.regions[0].start
        for number, name in enumerate((FIRST, SECOND)):
            function = board.ecam[0] + (number + 1 << 15)
            guest.config.bus.write(function + pci.COMMAND, 2, RUNNING)
            guest.config.bus.write(function + 0x42, 2, pci.MSIX_ENABLE)
            seen.append(kernel.dma(name, start + 0x100 * number, b"working!"))
            seen.append(kernel.fire(structs.MSIX, 1, name))
        guest.power_off()

    options: dict[str, Any] = {
        "pass": {"device": FIRST},
        "other": {"device": SECOND},
        "quiesce": {"drain_deadline": 0.1, "reset_deadline": 0.5, "watch": 0.01, "guard": False},
    }
    classes = (Pass, Other, QuiesceVdev)
    vm = machine(classes, ScriptedEngine(script), tmp_path, options=options, plugins=[plugin])
    outcome = vm.run()
    assert seen == [True] * 4
    assert (outcome.code, outcome.quiet) == (0, True), outcome.steps
    _, body = next(files.records())
    assert body is not None
    assert [(each["device"], each["verdict"]) for each in body["devices"]] == [
        (FIRST, "QUIESCED"), (SECOND, "QUIESCED")
    ]  # fmt: skip
    assert [kernel.calls.count(each) for each in ("GROUP_SET_CONTAINER", "IOMMU_MAP_DMA")] == [1, 1]
    assert kernel.calls.count("IOMMU_UNMAP_DMA") == 1
    assert not kernel.mappings
    assert not kernel.open_fds


def test_memory_stays_until_the_second_is_quiet(kernel: FakeKernel, both: Any, ram: Ram) -> None:
    first, second = both
    first.unmap_dma()
    first.unmap_dma()
    assert kernel.dma(SECOND, ram.iova, b"x"), "it may write on"
    second.unmap_dma()
    assert not kernel.mappings


def test_one_that_is_not_quiet_keeps_the_memory_for_both(kernel: FakeKernel, both: Any) -> None:
    first, second = both
    second.unmap_dma()
    second.close()
    assert kernel.mappings
    first.surrender()
    assert kernel.mappings
    assert first.handover().fds[0] >= 0


def test_the_group_is_open_until_the_last_is_closed(kernel: FakeKernel, both: Any) -> None:
    first, second = both
    first.close()
    first.close()
    assert second.config_read(0, 2) == 0x8086
    again = open_device(FIRST, kernel)
    assert kernel.calls.count("GROUP_SET_CONTAINER") == 1
    again.close()
    second.close()
    assert not kernel.open_fds
    open_device(FIRST, kernel).close()
    assert kernel.calls.count("GROUP_SET_CONTAINER") == 2


def test_two_functions_of_a_group_have_the_same_memory(kernel: FakeKernel, both: Any, ram: Ram) -> None:
    third = open_device(FIRST, kernel)
    third.give_memory([ram._replace(iova=0)])
    with pytest.raises(VfioError, match="IOMMU group 7 cannot have unlike memory"):
        third.map_dma()
    third.close()


def test_a_group_that_another_process_has_is_refused(kernel: FakeKernel) -> None:
    fd = kernel.open(kernel.dev / "7")
    with pytest.raises(VfioError, match="its IOMMU group 7 is in use"):
        open_device(FIRST, kernel)
    kernel.close(fd)
    open_device(FIRST, kernel).close()


def test_who_takes_both_over_has_one_group_and_gives_all_back(
    kernel: FakeKernel, both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_open", {})  # as in another process
    before = sorted(os.listdir("/proc/self/fd"))
    others = []
    for each in both:
        values, fds = each.handover()[2:]
        others.append(adopt(values, [os.dup(fd) for fd in fds], kernel))
    assert others[0].handover().fds[:2] == others[1].handover().fds[:2]
    for each in others:
        each.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_guard_takes_both_over_and_unmaps_once(kernel: FakeKernel, both: Any, ram: Ram) -> None:
    policy = Policy(drain_deadline=0.1, reset_deadline=0.5, watch=0.01)
    guard = Guard.start("test", [(each, attach(each), policy) for each in both], files.folder())
    container = os.dup(both[0].handover().fds[0])
    for each in both:
        each.config_write(pci.COMMAND, 2, RUNNING)
    guard._channel.close()
    limit = time.monotonic() + 20
    while not any(files.records()):
        assert time.monotonic() < limit
        time.sleep(0.005)
    _, body = next(files.records())
    assert body is not None
    assert [each["verdict"] for each in body["devices"]] == ["QUIESCED"] * 2, body
    assert os.pread(container, 200, 0).decode() == f"unmap {ram.iova:#x} {ram.size:#x}\n"
    os.close(container)
    guard._process.wait(20)
