"""The end of a VM with a passed device: quiesced by the vdev ``quiesce``, or by its guard."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_pass.device import Pass
from qvm_quiesce import pci, plugin
from qvm_quiesce import state as files
from qvm_quiesce.attach import attach
from qvm_quiesce.guard import Guard
from qvm_quiesce.hardware import Hardware
from qvm_quiesce.subject import Policy
from qvm_quiesce.vdev import QuiesceVdev
from qvm_vfio import structs
from qvm_vfio.fake import FakeFunction, FakeKernel, adopt

from qvmcore import boards
from qvmcore.api import HostError
from qvmcore.machine import Outcome
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import machine

NAME = "0000:03:00.0"
FAST: dict[str, Any] = {"drain_deadline": 0.1, "reset_deadline": 0.5, "watch": 0.01, "guard": False}
RUNNING = pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER


def run(tmp_path: Path, script: Callable[[ScriptedGuest], None], **options: Any) -> Outcome:
    values = {"pass": {"device": f"pci:{NAME}"}, "quiesce": {**FAST, **options}}
    classes = (Pass, QuiesceVdev)
    return machine(classes, ScriptedEngine(script), tmp_path, options=values, plugins=[plugin]).run()


def driver(kernel: FakeKernel) -> Callable[[ScriptedGuest], None]:
    """A guest that sets the device to work, sees it write to memory, and powers off."""

    def script(guest: ScriptedGuest) -> None:
        host = boards.get("arm64-virt").pci
        assert host is not None
        function = host.ecam[0] + (1 << 15)
        assert guest.read32(function) == 0x1234_8086
        guest.config.bus.write(function + pci.COMMAND, 2, RUNNING)
        guest.config.bus.write(function + 0x42, 2, pci.MSIX_ENABLE)
        start = guest.config.memory.regions[0].start
        assert kernel.dma(NAME, start + 0x100, b"working!")
        assert guest.config.memory.read(start + 0x100, 8) == b"working!"
        guest.power_off()

    return script


def test_the_end_quiesces_the_device_the_guest_left_at_work(tmp_path: Path, host: Any) -> None:
    kernel = host(FakeFunction())
    outcome = run(tmp_path, driver(kernel))
    assert (outcome.code, outcome.quiet) == (0, True), outcome.steps
    assert not kernel.config(NAME, pci.COMMAND, 2) & RUNNING
    assert not kernel.mappings
    assert not kernel.open_fds
    _, body = next(files.records())
    assert body is not None
    (device,) = body["devices"]
    assert (device["device"], device["verdict"]) == (NAME, "QUIESCED")


def test_bus_mastering_goes_off_before_the_reset_and_memory_last(tmp_path: Path, host: Any) -> None:
    """In the order of what the kernel was asked."""
    kernel = host(FakeFunction())
    seen: list[str] = []
    write, ioctl = kernel.pwrite, kernel.ioctl

    def watched_write(fd: int, data: bytes, offset: int) -> int:
        result: int = write(fd, data, offset)
        seen.append(f"command {kernel.config(NAME, pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER}")
        return result

    def watched_ioctl(fd: int, request: int, argument: Any = 0) -> int:
        result: int = ioctl(fd, request, argument)
        seen.append(kernel.calls[-1])
        return result

    kernel.pwrite, kernel.ioctl = watched_write, watched_ioctl
    run(tmp_path, driver(kernel))
    on = len(seen) - 1 - seen[::-1].index("command 4")
    reset, unmap = seen.index("DEVICE_RESET"), seen.index("IOMMU_UNMAP_DMA")
    assert on < reset < unmap


def test_a_device_without_a_reset_is_not_called_quiet_by_the_book(tmp_path: Path, host: Any) -> None:
    kernel = host(FakeFunction(resets=""), FakeFunction("0000:03:00.1", group=8, driver="nvme"))
    outcome = run(tmp_path, driver(kernel))
    assert outcome.code == 8
    _, body = next(files.records())
    assert body is not None
    assert body["devices"][0]["verdict"] == "DEGRADED"


def test_a_device_that_writes_on_is_quarantined_and_refused_next_time(tmp_path: Path, host: Any) -> None:
    """Its bus mastering reads as off; only its writes tell."""
    kernel = host(FakeFunction())
    stop = threading.Event()
    threads = []

    def script(guest: ScriptedGuest) -> None:
        memory = os.dup(guest.config.memory.regions[0].fd)

        def write() -> None:
            while not stop.wait(0.001):
                os.pwrite(memory, time.monotonic_ns().to_bytes(8, "little"), 0x200)
            os.close(memory)

        threads.append(threading.Thread(target=write))
        threads[0].start()
        guest.power_off()

    try:
        outcome = run(tmp_path, script)
    finally:
        stop.set()
        threads[0].join()
    assert outcome.code == 8
    assert kernel.mappings, "its memory stays where it writes to"
    for options in ({}, {"device": f"pci:{NAME}"}):
        with pytest.raises(HostError, match=r"0000:03:00\.0 is quarantined: memory of the guest changed"):
            run(tmp_path, script, **options)
    assert "GROUP_GET_DEVICE_FD" in kernel.calls
    assert kernel.calls.count("GROUP_GET_DEVICE_FD") == 1, "refused before it was touched"


def test_the_session_refuses_a_quarantined_device_too(
    tmp_path: Path, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever vdev passes it."""
    kernel = host(FakeFunction())
    seen = iter([{}, {NAME: {"reason": "it writes on"}}])
    monkeypatch.setattr(files, "quarantined", lambda root=None: next(seen))
    with pytest.raises(HostError, match="is quarantined: it writes on"):
        run(tmp_path, driver(kernel))
    assert not kernel.mappings
    assert not kernel.open_fds


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def guarded(passed: Any) -> Any:
    """A started device at work, handed over to a guard process."""
    plugged = passed(FakeFunction())
    (hardware,) = plugged.vdev.hardware()
    record = attach(hardware)
    policy = Policy(drain_deadline=0.1, reset_deadline=0.5, watch=0.01)
    guard = Guard.start("test", [(hardware, record, policy)], files.folder())
    assert plugged.device is not None
    plugged.device.write(pci.COMMAND, 0, 2)
    plugged.device.write(pci.COMMAND, RUNNING, 2)
    return plugged, hardware, guard


def test_a_guard_takes_over_when_the_vm_is_gone(guarded: Any) -> None:
    """The descriptors it got are enough: bus mastering off, reset, proof, memory unmapped."""
    plugged, hardware, guard = guarded
    kernel = plugged.vdev.kernel
    assert kernel.config(NAME, pci.COMMAND, 2) == RUNNING
    container = os.dup(hardware.handover().fds[0])
    guard._channel.close()
    wait_for(lambda: not kernel.config(NAME, pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER)
    wait_for(lambda: any(files.records()))
    _, body = next(files.records())
    assert body is not None
    assert (body["by"], body["verdict"]) == ("guard", "QUIESCED"), body
    region = plugged.memory.regions[0]
    assert os.pread(container, 100, 0) == f"unmap {region.start:#x} {region.size:#x}\n".encode()
    os.close(container)
    guard._process.wait(20)


def test_a_guard_that_is_dismissed_does_nothing(guarded: Any) -> None:
    plugged, _, guard = guarded
    guard.dismiss()
    assert plugged.vdev.kernel.config(NAME, pci.COMMAND, 2) == RUNNING
    assert not any(files.records())


def test_an_adopted_device_is_the_same_one(passed: Any) -> None:
    plugged = passed(FakeFunction())
    (hardware,) = plugged.vdev.hardware()
    handover = hardware.handover()
    fds = [os.dup(fd) for fd in handover.fds]
    other = adopt(json.loads(json.dumps(handover.values)), fds)
    checked: Hardware = other
    assert checked.name == NAME
    assert list(checked.resets) == list(hardware.resets)
    hardware.bar_write(0, 0x40, 4, 0xCAFE)
    assert checked.bar_read(0, 0x40, 4) == 0xCAFE
    region = plugged.memory.regions[0]
    region.view[0x100:0x104] = b"seen"
    assert bytes(checked.memory()[0][0x100:0x104]) == b"seen"
    assert checked.memory()[0].nbytes == region.size
    assert hardware.device.irqs[structs.MSIX] == 4
    other.close()
