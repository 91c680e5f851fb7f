"""Physical devices of the rig's machine over the kernel's own VFIO: what stops them, and what does not.

The machine's devices are emulated by QEMU behind an emulated IOMMU. What is special with them: edu's DMA
is one transfer 100 ms after the command, and no reset cancels it.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
from qvm_quiesce import pci
from qvm_quiesce import state as files
from qvm_quiesce.attach import AttachRecord, attach
from qvm_quiesce.evidence import Verdict, text_table
from qvm_quiesce.runner import Quiesce
from qvm_vfio.errors import VfioError
from qvm_vfio.hardware import VfioHardware, adopt, open_device
from qvm_vfio.kernel import Kernel
from qvm_vfio.sysfs import PciFunction

from tests.rig.inside.devices import bound, gone, guard_s_record, masters, until_off
from tests.rig.inside.vfio_owner import (
    POLICY,
    E1000e,
    Edu,
    Memory,
    Nvme,
    arrived,
    enable,
    find,
    received,
    take,
    wait_for,
)

OWNER = Path(__file__).parent / "vfio_owner.py"
Opened = Callable[[str], tuple[VfioHardware, AttachRecord]]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records and quarantine go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return files.folder()


@pytest.fixture
def frames() -> Iterator[None]:
    """Somebody sends broadcasts, about 300 a second, to the network the e1000e is on."""
    subprocess.run(["busybox", "ip", "link", "set", "eth0", "up"], check=True)
    stop = threading.Event()
    frame = b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + b"frame!!!" * 64

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            sock.setblocking(False)  # frames wait in the machine while nobody receives
            while not stop.wait(0.003):
                with suppress(BlockingIOError):
                    sock.send(frame)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.fixture
def edu(memory: Memory) -> Iterator[Edu]:
    """The edu device with a pattern in its buffer."""
    hardware = take(bound("edu"), memory)
    device = Edu(hardware, memory)
    device.load()
    yield device
    hardware.close()


@pytest.fixture
def opened(memory: Memory) -> Iterator[Opened]:
    """``opened(which)``: a device with its attach record, and the memory mapped for it."""
    with ExitStack() as stack:

        def begin(which: str) -> tuple[VfioHardware, AttachRecord]:
            hardware = open_device(bound(which))
            stack.callback(hardware.close)
            hardware.give_memory([memory.ram])
            record = attach(hardware)
            hardware.map_dma()
            return hardware, record

        yield begin


def quiesce(hardware: VfioHardware, record: AttachRecord, *, at_once: bool = False) -> Quiesce:
    work = Quiesce("rig", "vm", [(hardware, record, POLICY)])
    work.stop_dma("test", at_once=at_once)
    work.prove()
    return work


# -- the documented facts ----------------------------------------------------------------------------


def test_edu_writes_to_memory(edu: Edu) -> None:
    edu.arm()
    wait_for(lambda: arrived(edu.memory), "DMA")


def test_bus_mastering_off_stops_it(edu: Edu) -> None:
    edu.arm()
    edu.hardware.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    time.sleep(1)
    assert not arrived(edu.memory)


def test_a_reset_alone_does_not_stop_it_and_leaves_bus_mastering_on(edu: Edu) -> None:
    edu.arm()
    edu.hardware.reset(edu.hardware.resets[0])
    assert edu.hardware.config_read(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER
    wait_for(lambda: arrived(edu.memory), "DMA after the reset")


def test_a_function_of_the_host_s_driver_is_refused_with_the_commands() -> None:
    """The disk the rig runs from."""
    name = find(0, 0, "rig")
    with pytest.raises(VfioError, match=r"belongs to the host's driver nvme.*qvm_vfio bind"):
        open_device(name)
    assert PciFunction(Kernel(), name).driver == "nvme"


# -- quiescing -----------------------------------------------------------------------------------------


def test_edu_is_quiesced_with_a_transfer_pending(edu: Edu) -> None:
    record = attach(edu.hardware)
    enable(edu.hardware)
    edu.arm()
    work = quiesce(edu.hardware, record)
    assert work.evidence.verdict is Verdict.QUIESCED, text_table(work.evidence.devices)
    time.sleep(0.5)
    assert not arrived(edu.memory)


@pytest.mark.parametrize("at_once", [False, True], ids=["soft stop first", "at once"])
def test_nvme_is_quiesced_in_the_middle_of_reading(opened: Opened, memory: Memory, at_once: bool) -> None:
    """MSI-X is on and requests are under way, whose buffers QEMU has mapped: its drive ends them in a soft
    stop or a reset, whatever bus mastering says. After the proof nothing comes any more."""
    hardware, record = opened("slow")
    Nvme(hardware, memory).work()
    work = quiesce(hardware, record, at_once=at_once)
    assert work.evidence.verdict is Verdict.QUIESCED, text_table(work.evidence.devices)
    there = bytes(memory.map)
    time.sleep(1.5)
    assert bytes(memory.map) == there
    assert hardware.interrupts() > 0, "MSI-X was at work"


def test_e1000e_is_quiesced_while_it_receives(opened: Opened, memory: Memory, frames: None) -> None:
    hardware, record = opened("e1000e")
    E1000e(hardware, memory).work()
    work = quiesce(hardware, record)
    assert work.evidence.verdict is Verdict.QUIESCED, text_table(work.evidence.devices)
    there = received(memory.map)
    assert there < E1000e.RING, "there was room for more"
    time.sleep(0.5)
    assert received(memory.map) == there


# -- the owner is killed ------------------------------------------------------------------------------


class Owner:
    """A process that owns a device and keeps it busy."""

    def __init__(self, kind: str, which: str, memory: Memory, *, guard: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [kind, bound(which), memory.fd, theirs.fileno(), "guard" if guard else "none"]
        self.process = subprocess.Popen(
            [sys.executable, OWNER, *map(str, words)], pass_fds=[memory.fd, theirs.fileno()]
        )
        theirs.close()
        text, self.fds, _, _ = socket.recv_fds(ours, 1 << 16, 16)
        ours.close()
        assert text, "the owner ended"
        self.told = json.loads(text)

    def kill(self) -> float:
        """When it was killed; it may still be dying."""
        now = time.monotonic()
        self.process.send_signal(signal.SIGKILL)
        return now


def test_sigkill_of_an_owner_with_a_guard_while_frames_come(
    memory: Memory, frames: None, state: Path, record_property: Callable[[str, object], None]
) -> None:
    """The canary is the ring: not one more frame once bus mastering is off, though they keep coming."""
    owner = Owner("e1000e", "e1000e", memory, guard=True)
    assert masters("e1000e")
    took = until_off("e1000e", owner.kill())
    owner.process.wait()
    there = received(memory.map)
    record_property("death to bus mastering off, ms", round(took, 1))
    print(f"death to bus mastering off: {took:.1f} ms")
    assert there < E1000e.RING // 2, "there was room for more"
    guard_s_record()
    time.sleep(0.5)
    assert received(memory.map) == there


def test_sigkill_in_the_middle_of_nvme_reads_with_a_guard(memory: Memory, state: Path) -> None:
    owner = Owner("nvme", "slow", memory, guard=True)
    until_off("slow", owner.kill())
    owner.process.wait()
    guard_s_record()
    there = bytes(memory.map)
    time.sleep(1.5)
    assert bytes(memory.map) == there


def test_a_guard_is_faster_than_a_pending_transfer(memory: Memory, state: Path) -> None:
    """Edu writes 100 ms after its owner has killed itself, unless somebody stops it by then."""
    for _ in range(5):
        memory.map[Edu.TARGET : Edu.TARGET + 8] = bytes(8)
        owner = Owner("edu", "edu", memory, guard=True)
        owner.process.wait()
        took = until_off("edu", time.monotonic())
        wait_for(partial(gone, owner.told["guard"]), "the guard's end")
        time.sleep(0.3)
        if took < 60:
            assert not arrived(memory.map)
            return
    pytest.fail(f"bus mastering went off after {took:.0f} ms at best: this machine is too busy to tell")


def test_without_a_guard_dma_goes_on_while_somebody_holds_the_descriptor(
    memory: Memory, frames: None
) -> None:
    """What the guard is for; and whoever holds the descriptors can end it."""
    owner = Owner("e1000e", "e1000e", memory, guard=False)
    owner.kill()
    owner.process.wait()
    there = received(memory.map)
    wait_for(lambda: received(memory.map) > there + 20, "more frames for the dead owner")
    assert masters("e1000e")
    hardware = adopt(owner.told["values"], owner.fds)
    work = quiesce(hardware, AttachRecord.from_json(owner.told["attached"]))
    assert work.evidence.verdict is Verdict.QUIESCED, text_table(work.evidence.devices)
    there = received(memory.map)
    time.sleep(0.5)
    assert received(memory.map) == there
    hardware.close()


def test_without_anybody_else_the_kernel_stops_it(memory: Memory) -> None:
    """Guard and owner are both gone: the last line."""
    hardware = take(bound("slow"), memory)
    enable(hardware)
    assert masters("slow")
    hardware.close()
    assert not masters("slow")
