"""Eventfds that somebody else signals as interrupts of a function: straight, watched, or held (pending)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qvmcore.pci import spec
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.intx import SharedLine
from qvmcore.pci.sources import Stop, Way
from qvmcore.testing.fake_listening import FakeListening
from qvmcore.testing.fakes import FakeIrq

VECTORS = 4
ADDRESS = 0xFEE0_0000


class Rig:
    """A function whose vectors are eventfds, on an engine with ``room`` for some."""

    def __init__(self, room: int = 64) -> None:
        self.messages: list[tuple[int, int]] = []
        self.listening = FakeListening(self.messages, room)
        self.line = FakeIrq()
        self.shared = SharedLine(self.line, self.listening.listen_level)
        self.interrupts = PciInterrupts(VECTORS)
        self.interrupts.connect(self)
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(VECTORS + 2)]
        self.intx, self.resample = self.fds[-2:]
        self.ways = [Way.HELD] * VECTORS
        self.intx_way = Way.HELD

    def message(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def set_intx(self, level: bool) -> None:
        self.shared.drive(self, level)

    def pulse_intx(self) -> None:
        self.shared.pulse()

    def listen(self, fd: int, address: int, data: int) -> Stop | None:
        return self.listening.listen(fd, address, data)

    def listen_intx(self, fd: int, resample: int) -> Stop | None:
        return self.shared.listen(fd, resample)

    def program(self, vector: int, data: int, *, masked: bool = False) -> None:
        for at, value in ((0, ADDRESS), (8, data), (12, int(masked))):
            self.interrupts.table_write(16 * vector + at, 4, value)

    def mask(self, vector: int, masked: bool) -> None:
        self.interrupts.table_write(16 * vector + 12, 4, int(masked))

    def enable(self, on: bool = True, *, masked: bool = False) -> None:
        self.interrupts.set_control(on * spec.MSIX_ENABLE | masked * spec.MSIX_FUNCTION_MASK)

    def follow(self) -> None:
        for vector in range(VECTORS):
            self.interrupts.follow(vector, self.fds[vector], partial(self._turned, vector))

    def _turned(self, vector: int, way: Way) -> None:
        assert way is not self.ways[vector]
        self.ways[vector] = way

    def follow_intx(self) -> None:
        def turned(way: Way) -> None:
            self.intx_way = way

        self.interrupts.follow_intx(self.intx, self.resample, turned)

    def fire(self, vector: int) -> None:
        """As VFIO does; then the engine, or else the vdev's worker, looks."""
        os.eventfd_write(self.fds[vector], 1)
        self.look()

    def look(self) -> None:
        self.listening.look()
        for vector, way in enumerate(self.ways):
            if way is Way.WATCHED and self.count(vector):
                os.eventfd_read(self.fds[vector])
                self.interrupts.signal(vector)

    def count(self, vector: int) -> int:
        with open(f"/proc/self/fdinfo/{self.fds[vector]}") as file:
            return next(int(line.split()[1], 16) for line in file if line.startswith("eventfd-count"))

    @property
    def sent(self) -> list[int]:
        return [data for _, data in self.messages]

    @property
    def pba(self) -> int:
        return self.interrupts.table_read(self.interrupts.pba_offset, 4)

    def close(self) -> None:
        self.interrupts.silence()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.interrupts.set_command(spec.COMMAND_BUS_MASTER)
    yield made
    made.close()


def on(rig: Rig) -> Rig:
    """MSI-X with all vectors at work: vector n sends 0x40 + n."""
    for vector in range(VECTORS):
        rig.program(vector, 0x40 + vector)
    rig.enable()
    rig.follow()
    return rig


def test_an_open_vector_goes_straight_and_nobody_watches_it(rig: Rig) -> None:
    on(rig)
    assert rig.ways == [Way.STRAIGHT] * VECTORS
    assert rig.listening.attached == {rig.fds[n]: (ADDRESS, 0x40 + n) for n in range(VECTORS)}
    rig.fire(2)
    assert rig.sent == [0x42]


def test_6_8_3_4_while_masked_its_count_is_the_pending_bit_and_is_sent_once_afterwards(rig: Rig) -> None:
    on(rig).mask(1, True)
    assert rig.ways[1] is Way.HELD
    rig.fire(1)
    rig.fire(1)
    assert (rig.sent, rig.pba, rig.count(1)) == ([], 0b10, 2), "a look at the bit takes nothing"
    rig.mask(1, False)
    assert (rig.sent, rig.pba, rig.count(1)) == ([0x41], 0, 0)
    rig.mask(1, True)
    rig.mask(1, False)
    assert rig.sent == [0x41], "once"


@pytest.mark.parametrize("how", ["function mask", "bus master"])
def test_what_holds_all_vectors_holds_their_eventfds(rig: Rig, how: str) -> None:
    on(rig)
    if how == "function mask":
        rig.enable(masked=True)
    else:
        rig.interrupts.set_command(0)
    rig.fire(0)
    assert (rig.sent, rig.listening.attached) == ([], {})
    rig.enable()
    rig.interrupts.set_command(spec.COMMAND_BUS_MASTER)
    assert rig.sent == [0x40]


def test_a_message_that_was_rewritten_is_the_new_one_at_once(rig: Rig) -> None:
    on(rig).program(0, 0x77)
    rig.fire(0)
    assert rig.sent == [0x77]
    attachments = rig.listening.attachments
    rig.program(0, 0x77)
    assert rig.listening.attachments == attachments, "the same message is no change"


def test_without_room_in_the_engine_the_vdev_watches() -> None:
    rig = Rig(room=2)
    rig.interrupts.set_command(spec.COMMAND_BUS_MASTER)
    on(rig)
    assert rig.ways == [Way.STRAIGHT, Way.STRAIGHT, Way.WATCHED, Way.WATCHED]
    for vector in range(VECTORS):
        rig.fire(vector)
    assert sorted(rig.sent) == [0x40, 0x41, 0x42, 0x43]
    rig.mask(0, True)
    rig.program(3, 0x53)
    assert rig.ways == [Way.HELD, Way.STRAIGHT, Way.WATCHED, Way.STRAIGHT], "a place was free again"
    rig.close()


def test_an_interrupt_the_worker_took_just_before_a_mask_is_pending(rig: Rig) -> None:
    rig.listening.room = 0
    on(rig)
    os.eventfd_write(rig.fds[0], 1)
    os.eventfd_read(rig.fds[0])
    rig.mask(0, True)
    rig.interrupts.signal(0)
    rig.mask(1, True)
    rig.fire(1)
    assert (rig.sent, rig.pba) == ([], 0b11), "whoever has the count"
    rig.mask(0, False)
    assert rig.sent == [0x40]


def test_after_unfollow_counts_stay_and_nothing_is_sent(rig: Rig) -> None:
    on(rig).interrupts.unfollow()
    rig.fire(0)
    assert (rig.sent, rig.count(0), rig.listening.attached) == ([], 1, {})
    rig.follow()
    assert rig.sent == [0x40]


def test_after_silence_nothing_can_be_followed_again(rig: Rig) -> None:
    on(rig).interrupts.silence()
    rig.enable(False)
    rig.enable()
    rig.follow()
    rig.follow_intx()
    rig.fire(0)
    assert (rig.sent, rig.count(0), rig.listening.attached, rig.listening.lines) == ([], 1, {}, {})


def test_after_silence_not_even_what_the_worker_just_took_is_sent(rig: Rig) -> None:
    on(rig).mask(1, True)
    rig.interrupts.signal(1)
    rig.interrupts.set_intx(True)
    rig.interrupts.silence()
    rig.interrupts.signal(0)
    rig.mask(1, False)
    rig.enable(False)
    rig.interrupts.pulse_intx()
    assert (rig.sent, rig.line.level, rig.line.pulses) == ([], False, 0)


def test_whoever_keeps_the_table_is_told_vectors(rig: Rig) -> None:
    """A client over vfio-user: its mask bits are not ours."""
    told: list[int] = []
    rig.listening.room = 0
    rig.interrupts.on_vector = told.append
    rig.enable()
    rig.follow()
    rig.fire(3)
    assert told == [3]
    rig.enable(False)
    assert rig.ways == [Way.HELD] * VECTORS


# -- MSI -------------------------------------------------------------------------------------------------


def test_6_8_1_messages_of_msi_take_the_same_way(rig: Rig) -> None:
    rig.follow()
    assert rig.ways == [Way.HELD] * VECTORS
    rig.interrupts.set_msi([(ADDRESS, 0x50), None])
    assert rig.ways == [Way.STRAIGHT, Way.HELD, Way.HELD, Way.HELD]
    rig.fire(0)
    rig.fire(1)
    assert (rig.sent, rig.interrupts.pending) == ([0x50], 0b10)
    rig.interrupts.set_msi([(ADDRESS, 0x50), (ADDRESS, 0x51)])
    assert rig.sent == [0x50, 0x51]
    rig.interrupts.signal(1)
    rig.interrupts.signal(2)
    assert rig.sent == [0x50, 0x51, 0x51]
    rig.interrupts.set_msi(())
    rig.fire(0)
    assert len(rig.sent) == 3


def test_6_8_1_msi_silences_intx(rig: Rig) -> None:
    rig.interrupts.set_intx(True)
    rig.interrupts.set_msi([(ADDRESS, 0x50)])
    assert not rig.line.level
    rig.interrupts.set_msi(())
    assert rig.line.level


# -- INTx ------------------------------------------------------------------------------------------------


def test_2_2_6_intx_goes_straight_and_the_device_hears_when_it_was_served(rig: Rig) -> None:
    rig.listening.levels = True
    rig.follow_intx()
    assert rig.intx_way is Way.STRAIGHT
    os.eventfd_write(rig.intx, 1)
    rig.listening.look()
    assert (rig.listening.high, rig.line.level) == ({rig.intx}, False), "the or is the engine's"
    rig.listening.serve()
    assert os.eventfd_read(rig.resample) == 1


@pytest.mark.parametrize("how", ["INTx Disable", "MSI-X", "MSI", "silence"])
def test_a_line_that_may_not_be_driven_is_not(rig: Rig, how: str) -> None:
    rig.listening.levels = True
    rig.follow_intx()
    os.eventfd_write(rig.intx, 1)
    rig.listening.look()
    if how == "INTx Disable":
        rig.interrupts.set_command(spec.COMMAND_INTX_DISABLE)
    elif how == "MSI-X":
        rig.enable()
    elif how == "MSI":
        rig.interrupts.set_msi([(ADDRESS, 1)])
    else:
        rig.interrupts.silence()
    assert (rig.intx_way, rig.listening.lines, rig.listening.high) == (Way.HELD, {}, set())
    rig.interrupts.set_command(0)
    rig.enable(False)
    rig.interrupts.set_msi(())
    assert rig.intx_way is (Way.HELD if how == "silence" else Way.STRAIGHT)


def test_an_engine_without_it_leaves_intx_to_the_vdev(rig: Rig) -> None:
    rig.follow_intx()
    assert rig.intx_way is Way.WATCHED


def test_the_status_bit_is_the_device_s_where_nobody_here_sees_the_line(rig: Rig) -> None:
    assert not rig.interrupts.level
    rig.interrupts.asks = lambda: True
    assert rig.interrupts.level


# -- any sequence ----------------------------------------------------------------------------------------


class FollowModel(RuleBasedStateMachine):
    """No message is lost, none is sent while masked, none after the end; each has what was programmed."""

    few = st.integers(0, VECTORS - 1)

    @initialize(room=st.integers(0, VECTORS))
    def start(self, room: int) -> None:
        self.rig = Rig(room)
        for vector in range(VECTORS):
            self.rig.program(vector, 0x100 * vector)
        self.data = [0x100 * vector for vector in range(VECTORS)]
        self.masked, self.held = [False] * VECTORS, [0] * VECTORS
        self.enabled, self.function_mask, self.master, self.silent = False, False, False, False
        self.sent: Counter[int] = Counter()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()

    def deliver(self) -> None:
        for vector in range(VECTORS):
            if self.held[vector] and self.open(vector):
                self.held[vector] = 0
                self.sent[self.data[vector]] += 1

    def open(self, vector: int) -> bool:
        free = self.enabled and self.master and not self.function_mask and not self.silent
        return free and not self.masked[vector]

    @rule(vector=few)
    def fire(self, vector: int) -> None:
        if self.enabled:
            self.rig.fire(vector)
            self.held[vector] = 1
        self.deliver()

    @rule(vector=few, masked=st.booleans())
    def mask(self, vector: int, masked: bool) -> None:
        self.rig.mask(vector, masked)
        self.masked[vector] = masked
        self.deliver()

    @rule(vector=few, data=st.integers(1, 255))
    def rewrite(self, vector: int, data: int) -> None:
        self.rig.interrupts.table_write(16 * vector + 8, 4, data)
        self.data[vector] = data

    @rule(enable=st.booleans(), function_mask=st.booleans())
    def control(self, enable: bool, function_mask: bool) -> None:
        """As the vdev does it: it follows once MSI-X is on, and forgets once it is off."""
        if self.enabled and not enable:
            self.rig.enable(False)
            self.rig.interrupts.unfollow()
            for fd in self.rig.fds[:VECTORS]:
                os.eventfd_write(fd, 1)
                os.eventfd_read(fd)
            self.held = [0] * VECTORS
        else:
            self.rig.enable(enable, masked=function_mask)
            if enable:
                self.rig.follow()
        self.enabled, self.function_mask = enable, function_mask
        self.deliver()

    @rule(master=st.booleans())
    def command(self, master: bool) -> None:
        self.rig.interrupts.set_command(master * spec.COMMAND_BUS_MASTER)
        self.master = master
        self.deliver()

    @precondition(lambda self: not self.silent)
    @rule()
    def drop(self) -> None:
        self.rig.interrupts.silence()
        self.silent = True

    @invariant()
    def same(self) -> None:
        self.rig.look()
        assert Counter(self.rig.sent) == self.sent
        if not self.silent:
            assert self.rig.pba == sum(1 << n for n in range(VECTORS) if self.held[n])
        assert len(self.rig.listening.attached) <= self.rig.listening.room


TestFollowModel = FollowModel.TestCase
