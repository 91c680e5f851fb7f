"""The clock chip with a clock of the test's own: nothing here waits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_pc.rtc import (
    B_24H,
    B_AIE,
    B_BINARY,
    B_PIE,
    B_SET,
    B_UIE,
    C_AF,
    C_IRQF,
    C_PF,
    C_UF,
    CENTURY,
    DAY,
    FASTEST,
    HOURS,
    HOURS_ALARM,
    MINUTES,
    MINUTES_ALARM,
    MONTH,
    SECONDS,
    SECONDS_ALARM,
    SIZE,
    TIME,
    YEAR,
    A,
    B,
    C,
    D,
    Rtc,
)

#: Sunday, 22 November 2026, 13:08:09 UTC.
START = 1795352889
#: No periodic events.
QUIET = 0x20


class Clock:
    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rtc(clock: Clock) -> Rtc:
    rtc = Rtc(clock)
    rtc.write(A, QUIET)
    return rtc


def shown(rtc: Rtc) -> str:
    values = [rtc.read(index) for index in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)]
    return "{:02x}{:02x}-{:02x}-{:02x} {:02x}:{:02x}:{:02x}".format(*values)


def test_power_on_state(clock: Clock) -> None:
    rtc = Rtc(clock)
    assert (rtc.read(A), rtc.read(B), rtc.read(C), rtc.read(D)) == (0x26, B_24H, 0, 0x80)
    assert [rtc.read(index) for index in range(14, SIZE) if index != CENTURY] == [0] * (SIZE - 15)


def test_time_of_day_in_bcd_and_24_hours(rtc: Rtc, clock: Clock) -> None:
    assert shown(rtc) == "2026-11-22 13:08:09"
    clock.now += 86400 * 40
    assert shown(rtc) == "2027-01-01 13:08:09"


def test_the_format_of_register_b_is_that_of_the_reading(rtc: Rtc) -> None:
    rtc.write(B, B_BINARY)
    assert (rtc.read(HOURS), rtc.read(YEAR)) == (0x81, 26)
    rtc.write(B, B_BINARY | B_24H)
    assert rtc.read(HOURS) == 13


def test_setting_the_time_as_a_driver_does(rtc: Rtc, clock: Clock) -> None:
    rtc.write(B, B_24H | B_SET)
    clock.now += 5
    assert shown(rtc) == "2026-11-22 13:08:09", "with SET the clock stands"
    fields = (0x59, 0x58, 0x23, 1, 0x31, 0x12, 0x99, 0x19)
    for index, value in zip(TIME, fields, strict=True):
        assert rtc.write(index, value)
    assert rtc.write(B, B_24H)
    assert shown(rtc) == "1999-12-31 23:58:59"
    clock.now += 61
    assert shown(rtc) == "2000-01-01 00:00:00"


@pytest.mark.parametrize("divider", [0x60, 0x70])
def test_a_divider_in_reset_stands_and_has_no_periodic_events(rtc: Rtc, clock: Clock, divider: int) -> None:
    rtc.write(A, divider | 6)
    rtc.write(B, B_24H | B_PIE | B_UIE)
    rtc.read(C)
    clock.now += 2.5
    assert (rtc.read(SECONDS), rtc.read(C), rtc.due()) == (0x09, 0, None)


def test_other_dividers_run(rtc: Rtc, clock: Clock) -> None:
    for divider in (0x00, 0x10, 0x20, 0x30, 0x40, 0x50):
        rtc.write(A, divider)
        before = rtc.read(SECONDS)
        clock.now += 1
        assert rtc.read(SECONDS) == before + 1 + 6 * (before == 9)


def test_after_a_divider_reset_the_first_second_ends_half_a_second_later(rtc: Rtc, clock: Clock) -> None:
    clock.now += 0.9
    rtc.write(B, B_24H | B_SET)
    rtc.write(A, 0x70)
    rtc.write(SECONDS, 0x30)
    clock.now += 3.3
    rtc.write(B, B_24H)
    clock.now += 0.2
    assert rtc.read(SECONDS) == 0x30, "a divider in reset holds the clock too"
    rtc.write(A, QUIET)
    clock.now += 0.49
    assert rtc.read(SECONDS) == 0x30
    clock.now += 0.02
    assert rtc.read(SECONDS) == 0x31


def test_setting_one_register_of_a_running_clock_keeps_the_others(rtc: Rtc, clock: Clock) -> None:
    clock.now += 0.75
    rtc.write(MINUTES, 0x00)
    assert shown(rtc) == "2026-11-22 13:00:09"
    clock.now += 0.25
    assert shown(rtc) == "2026-11-22 13:00:10", "the second goes on where it was"


def test_a_time_that_does_not_exist_is_reported_and_changes_nothing(rtc: Rtc) -> None:
    assert not rtc.write(MONTH, 0x13)
    assert shown(rtc) == "2026-11-22 13:08:09"
    rtc.write(B, B_24H | B_SET)
    assert rtc.write(MONTH, 0x02), "while the clock stands, any bytes are held"
    assert rtc.write(DAY, 0x31)
    assert not rtc.write(B, B_24H)
    assert shown(rtc) == "2026-11-22 13:08:09"


def test_update_in_progress_announces_the_end_of_the_second(rtc: Rtc, clock: Clock) -> None:
    assert not rtc.read(A) & 0x80
    clock.now += 0.997
    assert not rtc.read(A) & 0x80
    clock.now += 0.001
    assert rtc.read(A) & 0x80
    assert rtc.read(SECONDS) == 0x09
    rtc.write(B, B_24H | B_SET)
    assert not rtc.read(A) & 0x80, "no update is in progress while SET"
    rtc.write(B, B_24H)
    clock.now += 0.003
    assert not rtc.read(A) & 0x80
    assert rtc.read(SECONDS) == 0x10


def test_update_in_progress_cannot_be_written(rtc: Rtc) -> None:
    rtc.write(A, 0x80 | QUIET)
    assert rtc.read(A) == QUIET


def test_update_ended_flag_comes_without_its_interrupt_too(rtc: Rtc, clock: Clock) -> None:
    clock.now += 1
    assert rtc.read(C) == C_UF
    assert not rtc.interrupt
    assert rtc.read(C) == 0, "reading takes it back"


def test_update_ended_interrupt(rtc: Rtc, clock: Clock) -> None:
    rtc.write(B, B_24H | B_UIE)
    assert rtc.due() == 1.0
    clock.now += 0.6
    rtc.look()
    assert not rtc.interrupt
    assert rtc.due() == pytest.approx(0.4)
    clock.now += 0.4
    rtc.look()
    assert rtc.interrupt
    assert rtc.due() is None, "no timer while the guest has not taken notice"
    assert rtc.read(C) == C_IRQF | C_UF
    assert not rtc.interrupt


def test_enabling_an_interrupt_whose_flag_is_set_raises_it(rtc: Rtc, clock: Clock) -> None:
    clock.now += 1
    rtc.look()
    rtc.write(B, B_24H | B_UIE)
    assert rtc.interrupt


def test_set_takes_the_update_interrupt_away(rtc: Rtc, clock: Clock) -> None:
    rtc.write(B, B_24H | B_SET | B_UIE)
    assert rtc.read(B) == B_24H | B_SET
    clock.now += 2
    assert rtc.read(C) == 0


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x10, 0x08, 0x13), 1),
        ((0x09, 0x08, 0x13), 86400),
        ((0x00, 0x00, 0xFF), 52 * 60 - 9),
        ((0x05, 0xFF, 0xFF), 56),
        ((0xFF, 0xFF, 0xFF), 1),
    ],
)
def test_alarm(rtc: Rtc, clock: Clock, alarm: tuple[int, int, int], seconds: int) -> None:
    for index, value in zip((SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM), alarm, strict=True):
        rtc.write(index, value)
        assert rtc.read(index) == value
    rtc.write(B, B_24H | B_AIE)
    clock.now += seconds - 1
    assert not rtc.read(C) & C_AF
    clock.now += 1
    rtc.look()
    assert rtc.interrupt
    assert rtc.read(C) == C_IRQF | C_AF | C_UF


def test_an_alarm_a_day_late_is_still_noticed(rtc: Rtc, clock: Clock) -> None:
    """The host slept."""
    rtc.write(HOURS_ALARM, 0x12)
    clock.now += 10 * 86400
    assert rtc.read(C) & C_AF


@pytest.mark.parametrize(
    ("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (9, 128), (10, 64), (15, 2)]
)
def test_periodic_rates(rtc: Rtc, clock: Clock, rate: int, hertz: int) -> None:
    rtc.write(A, QUIET | rate)
    count = 0
    for _ in range(64):
        clock.now += 1 / hertz / 4
        count += bool(rtc.read(C) & C_PF)
    assert count == 16


def test_periodic_interrupt_is_bounded_whatever_the_rate_is(rtc: Rtc, clock: Clock) -> None:
    rtc.write(A, QUIET | 3)  # 8192 Hz
    rtc.write(B, B_24H | B_PIE)
    due = rtc.due()
    assert due is not None
    assert due >= 1 / FASTEST
    clock.now += due
    rtc.look()
    assert rtc.read(C) == C_IRQF | C_PF


def test_a_periodic_event_is_due_at_the_end_of_its_period(rtc: Rtc, clock: Clock) -> None:
    rtc.write(A, QUIET | 15)  # twice a second
    rtc.write(B, B_24H | B_PIE)
    clock.now += 0.1
    assert rtc.due() == pytest.approx(0.4)


def test_no_rate_is_no_periodic_event(rtc: Rtc, clock: Clock) -> None:
    rtc.write(B, B_24H | B_PIE)
    clock.now += 0.5
    assert rtc.read(C) == 0
    assert rtc.due() is None


def test_a_host_clock_set_back_is_survived(rtc: Rtc, clock: Clock) -> None:
    rtc.write(B, B_24H | B_UIE | B_AIE)
    clock.now -= 7200
    assert rtc.read(C) & C_UF
    assert rtc.due() == 1.0
    clock.now += 1
    assert rtc.read(C) & C_UF


def test_bits_are_where_the_data_sheet_has_them(clock: Clock) -> None:
    """In numbers, for a name could be wrong on both sides."""
    rtc = Rtc(clock)
    rtc.write(0x0A, 0x26)
    rtc.write(0x0B, 0x72)
    for alarm in (1, 3, 5):
        rtc.write(alarm, 0xFF)
    clock.now += 1
    assert rtc.read(0x0C) == 0xF0
    rtc.write(0x0B, 0x02)
    clock.now += 1 / 1024
    assert rtc.read(0x0C) == 0x40
    clock.now += 1
    assert rtc.read(0x0C) == 0x70
    rtc.write(0x0B, 0x82)
    clock.now += 5
    assert rtc.read(0) == 0x11
    rtc.write(0x0B, 0x06)
    assert rtc.read(7) == 22


def test_nothing_is_due_unless_it_is_enabled(rtc: Rtc) -> None:
    rtc.write(A, QUIET | 6)
    assert rtc.due() is None


def test_memory_holds_what_is_written(rtc: Rtc) -> None:
    for index in range(14, SIZE):
        if index != CENTURY:
            assert rtc.write(index, index ^ 0xA5)
    assert all(rtc.read(index) == index ^ 0xA5 for index in range(14, SIZE) if index != CENTURY)


def test_a_host_clock_set_back_onto_the_alarm_raises_it(rtc: Rtc, clock: Clock) -> None:
    for index, value in ((HOURS_ALARM, 0x12), (MINUTES_ALARM, 0x00), (SECONDS_ALARM, 0x00)):
        rtc.write(index, value)
    clock.now -= 3600 + 8 * 60 + 10
    assert not rtc.read(C) & C_AF
    clock.now += 5000
    rtc.read(C)
    clock.now -= 5000 - 1
    assert rtc.read(C) & C_AF


def test_registers_c_and_d_cannot_be_written(rtc: Rtc) -> None:
    rtc.write(C, 0xFF)
    rtc.write(D, 0x00)
    assert (rtc.read(C), rtc.read(D)) == (0, 0x80)


def test_reset_keeps_time_and_memory_and_ends_interrupts(rtc: Rtc, clock: Clock) -> None:
    rtc.write(0x40, 0x5A)
    rtc.write(MINUTES, 0x00)
    rtc.write(B, B_24H | B_UIE | B_PIE | B_AIE)
    clock.now += 1
    rtc.look()
    assert rtc.interrupt
    rtc.reset()
    assert not rtc.interrupt
    assert (rtc.read(B), rtc.read(C), rtc.read(0x40)) == (B_24H, 0, 0x5A)
    assert shown(rtc) == "2026-11-22 13:00:10"


writes = st.tuples(st.integers(0, SIZE - 1), st.integers(0, 255), st.floats(-5, 90000))


@settings(max_examples=200, deadline=None)
@given(st.lists(writes, max_size=30))
def test_any_traffic_at_any_time_gives_bytes(steps: list[tuple[int, int, float]]) -> None:
    clock = Clock()
    rtc = Rtc(clock)
    for index, value, passed in steps:
        rtc.write(index, value)
        clock.now += passed
        assert all(0 <= rtc.read(each) <= 0xFF for each in range(SIZE))
        due = rtc.due()
        assert due is None or due > 0
