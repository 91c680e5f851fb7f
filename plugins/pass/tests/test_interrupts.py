"""Interrupts of a physical function: MSI-X, MSI and INTx, straight to the engine or by the vdev's worker."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from qvm_pass.device import Pass
from qvm_quiesce import pci
from qvm_vfio import structs
from qvm_vfio.fake import FakeFunction, FakeKernel
from qvm_vfio.hardware import VfioHardware

from qvmcore.testing.fake_listening import FakeListening
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.pci_driver import PciDevice

NAME = "0000:03:00.0"
ADDRESS = 0xFEE0_0000
MASTER, MEMORY = pci.COMMAND_BUS_MASTER, pci.COMMAND_MEMORY
INTX_OFF = pci.COMMAND_INTX_DISABLE
#: Of the MSI capability.
CONTROL, DATA, MASK, PENDING = 2, 12, 16, 20


class Guest:
    """A driver of the passed function; the engine listens to ``room`` eventfds, and to lines or not."""

    def __init__(self, plugged: Plugged[Pass], room: int, *, levels: bool) -> None:
        assert plugged.pci is not None
        assert plugged.device is not None
        kernel = plugged.vdev.kernel
        assert isinstance(kernel, FakeKernel)
        self.plugged = plugged
        self.kernel = kernel
        self.device: PciDevice = plugged.device
        self.listening: FakeListening = plugged.pci.listening
        self.listening.room, self.listening.levels = room, levels
        self.at = {kind: at for at, kind in plugged.device.capabilities()}
        plugged.vdev.on_starting()

    @property
    def hardware(self) -> VfioHardware:
        (found,) = self.plugged.vdev.hardware()
        return found

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.plugged.vdev.status())

    @property
    def ways(self) -> tuple[Any, ...]:
        return tuple(self.status[name] for name in ("kind", "straight", "watched"))

    @property
    def sent(self) -> list[int]:
        return [data for _, data in self.listening.messages]

    def command(self, value: int) -> None:
        self.device.write(pci.COMMAND, value, 2)

    def vector(self, number: int, data: int, *, masked: bool = False) -> None:
        base = self.device.bars[2][0] + 16 * number
        for at, value in ((0, ADDRESS), (4, 0), (8, data), (12, int(masked))):
            self.plugged.bus.write(base + at, 4, value)

    def msix(self, on: bool = True) -> None:
        self.device.write(self.at[pci.CAP_MSIX] + pci.MSIX_CONTROL, pci.MSIX_ENABLE * on, 2)

    def msi(self, data: int, *, exponent: int = 0, mask: int = 0, on: bool = True) -> None:
        at = self.at[pci.CAP_MSI]
        for register, value in ((4, ADDRESS), (8, 0), (DATA, data), (MASK, mask)):
            self.device.write(at + register, value)
        self.device.write(at + CONTROL, on * pci.MSI_ENABLE | exponent << 4, 2)

    def msi_read(self, register: int, size: int = 4) -> int:
        return self.device.read(self.at[pci.CAP_MSI] + register, size)

    def fire(self, kind: int, vector: int = 0) -> bool:
        """The device interrupts; the kernel's KVM, and the worker, do what is theirs."""
        came = self.kernel.fire(kind, vector)
        self.settle()
        return came

    def settle(self) -> None:
        self.listening.look()
        self.plugged.settle()

    @property
    def line(self) -> bool:
        return self.plugged.irq.level or bool(self.listening.high)


@pytest.fixture
def driven(passed: Any) -> Any:
    """``driven(function, room=64, levels=True, **options)``: a guest that drives it."""

    def make(*functions: FakeFunction, room: int = 64, levels: bool = True, **options: Any) -> Guest:
        return Guest(passed(*functions, start=False, **options), room, levels=levels)

    return make


# -- MSI-X -----------------------------------------------------------------------------------------------


def test_an_interrupt_of_the_device_never_comes_to_the_worker(driven: Any) -> None:
    guest = driven()
    for vector in range(4):
        guest.vector(vector, 0x40 + vector)
    guest.msix()
    assert guest.ways == ("MSI-X", 4, 0)
    for _ in range(100):
        assert guest.fire(structs.MSIX, 2)
    assert guest.sent == [0x42] * 100
    assert not guest.plugged.ctx.worker_alive
    assert guest.status["interrupts"] == 0, "KVM takes the counts"


def test_what_the_engine_has_no_room_for_goes_by_the_worker(driven: Any) -> None:
    guest = driven(room=1)
    for vector in range(4):
        guest.vector(vector, 0x40 + vector)
    guest.msix()
    assert guest.ways == ("MSI-X", 1, 3)
    for vector in range(4):
        guest.fire(structs.MSIX, vector)
    assert sorted(guest.sent) == [0x40, 0x41, 0x42, 0x43]
    assert guest.status["interrupts"] == 3


def test_a_masked_vector_is_pending_in_its_eventfd(driven: Any) -> None:
    guest = driven()
    guest.vector(1, 0x41, masked=True)
    guest.msix()
    guest.fire(structs.MSIX, 1)
    pba = guest.device.bars[2][0] + 16 * 4
    assert (guest.sent, guest.plugged.bus.read(pba, 4)) == ([], 0b10)
    guest.vector(1, 0x51)
    assert (guest.sent, guest.plugged.bus.read(pba, 4)) == ([0x51], 0)


def test_what_was_pending_when_msix_went_off_is_forgotten(driven: Any) -> None:
    guest = driven()
    guest.vector(1, 0x41, masked=True)
    guest.msix()
    guest.fire(structs.MSIX, 1)
    guest.msix(False)
    guest.msix()
    guest.vector(1, 0x51)
    assert guest.sent == []


# -- MSI -------------------------------------------------------------------------------------------------


def test_6_8_1_3_the_capability_is_wide_and_maskable(driven: Any) -> None:
    guest = driven(FakeFunction(messages=4))
    assert guest.msi_read(CONTROL, 2) == 1 << 8 | 1 << 7 | 2 << 1
    for register, size in ((4, 4), (8, 4), (DATA, 4), (MASK, 4), (PENDING, 4)):
        guest.device.write(guest.at[pci.CAP_MSI] + register, 0xFFFF_FFFF, size)
    assert [guest.msi_read(register) for register in (4, 8, DATA, MASK, PENDING)] == [
        0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF, 0xF, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("width", [2, 4])
def test_6_8_1_a_message_of_msi_goes_straight(driven: Any, width: int) -> None:
    """However wide the guest writes the control register."""
    guest = driven(FakeFunction(vectors=0))
    assert guest.ways == ("INTx", 1, 0)
    guest.msi(0x61, on=False)
    at = guest.at[pci.CAP_MSI]
    guest.device.write(at + 4 - width, pci.MSI_ENABLE << 8 * (width - 2), width)
    assert guest.msi_read(CONTROL, 2) & pci.MSI_ENABLE
    assert guest.kernel.kind == structs.MSI
    assert guest.ways == ("MSI", 1, 0)
    guest.fire(structs.MSI)
    assert guest.sent == [0x61]
    guest.msi(0x61, on=False)
    assert guest.ways == ("INTx", 1, 0)
    assert not guest.fire(structs.MSI)


def test_6_8_1_6_several_messages_have_their_number_in_the_data(driven: Any) -> None:
    guest = driven(FakeFunction(messages=4))
    guest.msi(0x63, exponent=2)
    assert len(guest.kernel.eventfds) == 4
    for number in (3, 0, 2):
        guest.fire(structs.MSI, number)
    assert guest.sent == [0x63, 0x60, 0x62]
    guest.msi(0x63, exponent=1)
    assert len(guest.kernel.eventfds) == 2
    guest.msi(0x63, exponent=7)
    assert len(guest.kernel.eventfds) == 4, "no more than it is capable of"


def test_6_8_1_9_a_masked_message_is_pending(driven: Any) -> None:
    guest = driven(FakeFunction(messages=2))
    guest.msi(0x60, exponent=1, mask=0b10)
    guest.fire(structs.MSI, 0)
    guest.fire(structs.MSI, 1)
    assert (guest.sent, guest.msi_read(PENDING)) == ([0x60], 0b10)
    guest.device.write(guest.at[pci.CAP_MSI] + MASK, 0)
    assert (guest.sent, guest.msi_read(PENDING)) == ([0x60, 0x61], 0)


def test_msi_by_the_worker_where_the_engine_does_not_listen(driven: Any) -> None:
    guest = driven(room=0)
    guest.msi(0x60)
    assert guest.ways == ("MSI", 0, 1)
    guest.fire(structs.MSI)
    assert guest.sent == [0x60]
    assert guest.status["interrupts"] == 1


def test_messages_need_bus_mastering(driven: Any) -> None:
    guest = driven()
    guest.msi(0x60)
    guest.command(MEMORY)
    guest.fire(structs.MSI)
    assert guest.sent == []
    guest.command(MEMORY | MASTER)
    assert guest.sent == [0x60]


def test_the_guest_gets_as_many_messages_as_the_host_has(passed: Any, monkeypatch: Any) -> None:
    """Found before the start: Linux on a host without interrupt remapping has one."""
    real = FakeKernel._device_set_irqs

    def few(kernel: FakeKernel, fd: int, body: bytearray) -> int:
        head = structs.IrqSet.from_buffer_copy(body)
        return 2 if head.index == structs.MSI and head.count > 2 else real(kernel, fd, body)

    monkeypatch.setattr(FakeKernel, "_device_set_irqs", few)
    guest = Guest(passed(FakeFunction(messages=32), start=False), 64, levels=True)
    assert guest.msi_read(CONTROL, 2) >> 1 & 7 == 1
    assert guest.kernel.kind == structs.INTX


@pytest.mark.parametrize(("has", "option", "expected"), [(32, 32, 5), (32, 5, 2), (1, 32, 0), (64, 256, 5)])
def test_the_number_of_messages_is_bounded(passed: Any, has: int, option: int, expected: int) -> None:
    guest = Guest(passed(FakeFunction(messages=has), start=False, vectors=option), 64, levels=True)
    assert guest.msi_read(CONTROL, 2) >> 1 & 7 == expected


def test_a_device_without_msi_shows_none(driven: Any) -> None:
    assert pci.CAP_MSI not in driven(FakeFunction(messages=0)).at


# -- INTx ------------------------------------------------------------------------------------------------


def test_intx_goes_straight_and_is_unmasked_when_it_was_served(driven: Any) -> None:
    guest = driven(FakeFunction(vectors=0))
    assert guest.ways == ("INTx", 1, 0)
    for _ in range(10):
        assert guest.fire(structs.INTX)
        assert guest.line
        assert not guest.fire(structs.INTX), "masked in the kernel"
        guest.listening.serve()
        assert not guest.line
    assert not guest.plugged.ctx.worker_alive
    assert not guest.plugged.irq.rises, "nothing but the engine drove it"


def test_a_line_that_came_to_somebody_who_went_away_comes_again(driven: Any) -> None:
    """The kernel has it masked; INTx Disable took it from the engine before the guest had served it."""
    guest = driven(FakeFunction(vectors=0))
    guest.fire(structs.INTX)
    guest.command(MEMORY | MASTER | INTX_OFF)
    assert not guest.line
    guest.command(MEMORY | MASTER)
    assert guest.fire(structs.INTX), "unmasked"
    assert guest.line


def test_6_2_2_intx_disable_holds_it(driven: Any) -> None:
    guest = driven(FakeFunction(vectors=0))
    guest.command(MEMORY | MASTER | INTX_OFF)
    assert guest.fire(structs.INTX)
    assert not guest.line
    guest.command(MEMORY | MASTER)
    assert guest.line


def test_6_2_3_the_status_bit_is_the_device_s(driven: Any) -> None:
    guest = driven(FakeFunction(vectors=0))
    assert not guest.device.read(pci.STATUS, 2) & pci.STATUS_INTERRUPT
    status = guest.kernel.config(NAME, pci.STATUS, 2) | pci.STATUS_INTERRUPT
    guest.kernel.poke(NAME, structs.CONFIG_REGION, pci.STATUS, status.to_bytes(2, "little"))
    assert guest.device.read(pci.STATUS, 2) & pci.STATUS_INTERRUPT


def test_a_mapped_device_whose_line_the_engine_does_not_take_is_looked_at_again(driven: Any) -> None:
    """Its registers are read without us: a pulse, which comes again if it is still wanted, and no storm."""
    guest = driven(FakeFunction(vectors=0), levels=False)
    assert guest.ways == ("INTx", 0, 1)
    assert guest.fire(structs.INTX)
    assert guest.plugged.irq.wait(1)
    assert not guest.plugged.irq.level
    assert any(guest.fire(structs.INTX) for _ in range(10_000)), "it stays masked"
    assert guest.plugged.irq.wait(2)
    guest.msi(1)
    later: list[int] = []
    guest.plugged.ctx.worker.call_later(0.01, lambda: later.append(1))
    while not later:
        guest.settle()
    assert guest.status["failures"] == 0, "no INTx to unmask any more"


def test_where_accesses_come_to_us_the_line_falls_at_the_next_one_only(driven: Any) -> None:
    """The engine does not map what it may map."""
    guest = driven(FakeFunction(vectors=0), levels=False)
    base = guest.device.bars[0][0] + 0x1000
    guest.plugged.bus.read(base, 4)
    assert guest.fire(structs.INTX)
    assert guest.plugged.irq.wait(1)
    later: list[int] = []
    guest.plugged.ctx.worker.call_later(0.1, lambda: later.append(guest.plugged.irq.level))
    while not later:
        guest.settle()
    assert later == [True]
    guest.plugged.bus.read(base, 4)
    assert not guest.line


def test_kinds_replace_each_other(driven: Any) -> None:
    guest = driven()
    seen = [guest.ways[0]]
    for step in (
        guest.msix, lambda: guest.msix(False), lambda: guest.msi(1), guest.msix,
        lambda: guest.msix(False), lambda: guest.msi(1, on=False),
    ):  # fmt: skip
        step()
        seen.append(guest.ways[0])
    assert seen == ["INTx", "MSI-X", "INTx", "MSI", "MSI-X", "MSI", "INTx"]
    assert guest.status["failures"] == 0


def test_a_guest_s_reset_switches_all_off(driven: Any) -> None:
    guest = driven()
    guest.msi(0x60)
    guest.device.write(guest.at[pci.CAP_EXPRESS] + pci.EXPRESS_DEVICE_CONTROL, pci.EXPRESS_START_FLR, 2)
    assert not guest.msi_read(CONTROL, 2) & pci.MSI_ENABLE
    assert guest.ways[0] == "INTx"


# -- the end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 64])
def test_once_revoked_no_interrupt_reaches_the_guest_and_late_ones_are_counted(
    driven: Any, room: int
) -> None:
    guest = driven(room=room, levels=bool(room))
    guest.vector(0, 0x40)
    guest.vector(1, 0x41, masked=True)
    guest.msix()
    guest.fire(structs.MSIX, 0)
    before = guest.hardware.interrupts()
    guest.hardware.revoke()
    guest.fire(structs.MSIX, 0)
    guest.vector(1, 0x41)
    guest.fire(structs.MSIX, 1)
    assert (guest.sent, guest.listening.attached) == ([0x40], {})
    assert guest.hardware.interrupts() == before + 2
    guest.hardware.drop_interrupts()
    guest.msix(False)
    guest.msix()
    guest.msi(0x60)
    guest.command(0)
    guest.command(MEMORY | MASTER)
    assert guest.kernel.kind is None, "nothing is connected again"
    assert (guest.sent, guest.listening.attached, guest.listening.lines) == ([0x40], {}, {})
    assert guest.hardware.interrupts() == before + 2


def test_a_switch_that_was_on_its_way_when_the_device_was_taken_away_is_refused(driven: Any) -> None:
    guest = driven()
    guest.hardware.revoke()
    guest.hardware.revoked = False  # it had looked just before
    guest.msix()
    assert guest.kernel.kind is None
    assert guest.status["failures"] == 1


def test_the_line_falls_when_the_device_is_taken_away(driven: Any) -> None:
    guest = driven(FakeFunction(vectors=0), levels=False, direct=False)
    guest.fire(structs.INTX)
    assert guest.line
    guest.hardware.revoke()
    assert not guest.line


def test_a_thousand_changes_of_kind_leave_no_descriptor_and_nothing_attached(driven: Any) -> None:
    guest = driven(FakeFunction(messages=4))
    guest.vector(0, 0x40)

    def cycle() -> None:
        guest.msix()
        guest.msix(False)
        guest.msi(0x60, exponent=2)
        guest.msi(0x60, on=False)

    cycle()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        cycle()
    assert len(os.listdir("/proc/self/fd")) == before
    assert (len(guest.listening.attached), len(guest.listening.lines)) == (0, 1)
    assert guest.status["failures"] == 0
    guest.plugged.terminate()
    assert (guest.listening.attached, guest.listening.lines) == ({}, {})


class AnyGuest(RuleBasedStateMachine):
    """Any sequence of the guest's and the device's: none lost, none while masked, none after the end."""

    few = st.integers(0, 3)

    @initialize(room=st.integers(0, 6))
    def start(self, room: int) -> None:
        kernel = FakeKernel(ANY.root / str(next(ANY.numbers)), (FakeFunction(messages=2),))
        Pass.kernel = kernel
        self.plugged = plug(Pass, {"device": f"pci:{NAME}"}, start=False)
        self.guest = Guest(self.plugged, room, levels=True)
        for vector in range(4):
            self.guest.vector(vector, 0x40 + vector)
        self.masked = [False] * 4
        self.held: set[int] = set()
        self.msi_mask = 0
        self.msix, self.msi, self.master, self.over = False, False, True, False
        self.sent: Counter[int] = Counter()

    def teardown(self) -> None:
        if hasattr(self, "plugged"):
            self.plugged.close()
            assert (self.guest.listening.attached, self.guest.listening.lines) == ({}, {})
            self.guest.kernel.close_all()

    @property
    def kind(self) -> int:
        return structs.MSIX if self.msix else structs.MSI if self.msi else structs.INTX

    def deliver(self) -> None:
        for vector in tuple(self.held):
            mask = self.masked[vector] if self.msix else self.msi_mask >> vector & 1
            if self.master and not mask and not self.over:
                self.held.remove(vector)
                self.sent[(0x40 if self.msix else 0x60) + vector] += 1

    def switched(self, before: int) -> None:
        if self.kind != before:
            self.held.clear()
        self.deliver()

    @rule(vector=few)
    def fire(self, vector: int) -> None:
        if self.kind != structs.INTX and self.guest.fire(self.kind, vector):
            self.held.add(vector)
        self.deliver()

    @rule(vector=few, masked=st.booleans())
    def mask(self, vector: int, masked: bool) -> None:
        self.guest.vector(vector, 0x40 + vector, masked=masked)
        self.masked[vector] = masked
        self.deliver()

    @rule(on=st.booleans())
    def switch_msix(self, on: bool) -> None:
        before, self.msix = self.kind, on
        self.guest.msix(on)
        self.switched(before)

    @rule(on=st.booleans(), mask=st.integers(0, 3))
    def switch_msi(self, on: bool, mask: int) -> None:
        before, self.msi, self.msi_mask = self.kind, on, mask
        self.guest.msi(0x60, exponent=1, mask=mask, on=on)
        self.switched(before)

    @rule(master=st.booleans(), disable=st.booleans())
    def command(self, master: bool, disable: bool) -> None:
        self.guest.command(MEMORY | MASTER * master | INTX_OFF * disable)
        self.master = master
        self.deliver()

    @precondition(lambda self: not self.over)
    @rule()
    def revoke(self) -> None:
        self.guest.hardware.revoke()
        self.over = True

    @invariant()
    def same(self) -> None:
        self.guest.settle()
        assert Counter(self.guest.sent) == self.sent
        assert not self.plugged.ctx.faults


class ANY:
    """Where the hosts of the test below are."""

    root: Path
    numbers: Iterator[int]


def test_any_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis import settings
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr(Pass, "kernel", Pass.kernel)
    ANY.root, ANY.numbers = tmp_path, iter(range(1 << 30))
    run_state_machine_as_test(AnyGuest, settings=settings(max_examples=60, deadline=None))
