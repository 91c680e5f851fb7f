"""The generic timer alone, with a clock of its own."""

from __future__ import annotations

import pytest
from qvm_emulator.timer import CTL_ENABLE, CTL_IMASK, CTL_ISTATUS, NEVER, TimerChannel


class Rig:
    def __init__(self) -> None:
        self.now = 16_000
        self.level = False
        self.moves = 0
        self.timer = TimerChannel(self._line, self._moved, lambda: self.now)

    def _line(self, level: bool) -> None:
        self.level = level

    def _moved(self) -> None:
        self.moves += 1


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_fires_at_the_compare_value(rig: Rig) -> None:
    rig.timer.write_compare(2_000)
    rig.timer.write_control(CTL_ENABLE)
    assert rig.timer.deadline == 32_000
    assert not rig.level
    rig.now = 31_999
    rig.timer.expire(rig.now)
    assert not rig.level
    rig.now = 32_000
    rig.timer.expire(rig.now)
    assert rig.level
    assert rig.timer.deadline == NEVER
    assert rig.timer.read_control() == CTL_ENABLE | CTL_ISTATUS


def test_value_is_a_signed_distance(rig: Rig) -> None:
    rig.timer.write_value(500)
    assert rig.timer.read_compare() == 1_500
    assert rig.timer.read_value() == 500
    rig.timer.write_value(0xFFFF_FFFF)
    assert rig.timer.read_compare() == 999
    assert rig.timer.read_value() == 0xFFFF_FFFF
    rig.timer.write_control(CTL_ENABLE)
    assert rig.level


def test_masked_condition_shows_in_status_only(rig: Rig) -> None:
    rig.timer.write_compare(0)
    rig.timer.write_control(CTL_ENABLE | CTL_IMASK)
    assert not rig.level
    assert rig.timer.deadline == NEVER
    assert rig.timer.read_control() & CTL_ISTATUS
    rig.timer.write_control(CTL_ENABLE)
    assert rig.level
    rig.timer.write_control(0)
    assert not rig.level
    assert rig.timer.read_control() == 0


def test_reprogramming_drops_the_line(rig: Rig) -> None:
    rig.timer.write_compare(0)
    rig.timer.write_control(CTL_ENABLE)
    assert rig.level
    rig.timer.write_compare(5_000)
    assert not rig.level
    assert rig.timer.deadline == 80_000
    assert rig.moves == 3


def test_far_compare_value_never_fires(rig: Rig) -> None:
    rig.timer.write_control(CTL_ENABLE)
    rig.timer.write_compare((1 << 64) - 1)
    assert rig.timer.deadline == NEVER
    assert not rig.level
