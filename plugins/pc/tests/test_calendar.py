"""Time of day in registers: both codes, both kinds of hour, and what is no time at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qvm_pc.calendar import DAY, Alarm, decode, encode

#: 1900-01-01 and 9999-12-31T23:59:59.
FIRST, LAST = -2208988800, 253402300799
formats = st.fixed_dictionaries({"binary": st.booleans(), "hours24": st.booleans()})


@pytest.mark.parametrize(
    ("binary", "hours24", "raw"),
    [
        (False, True, [0x09, 0x08, 0x13, 0x01, 0x22, 0x11, 0x26, 0x20]),
        (True, True, [9, 8, 13, 1, 22, 11, 26, 20]),
        (False, False, [0x09, 0x08, 0x81, 0x01, 0x22, 0x11, 0x26, 0x20]),
        (True, False, [9, 8, 0x81, 1, 22, 11, 26, 20]),
    ],
)
def test_one_afternoon_in_every_code(binary: bool, hours24: bool, raw: list[int]) -> None:
    """Sunday, 22 November 2026, 13:08:09."""
    assert encode(1795352889, binary=binary, hours24=hours24) == raw
    assert decode(raw, binary=binary, hours24=hours24) == 1795352889


@pytest.mark.parametrize(("hour", "raw"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (23, 0x91)])
def test_twelve_hours_begin_with_twelve(hour: int, raw: int) -> None:
    assert encode(hour * 3600, binary=False, hours24=False)[2] == raw


@given(st.integers(FIRST, LAST), formats)
def test_every_second_of_eight_thousand_years_survives(seconds: int, kind: dict[str, bool]) -> None:
    assert decode(encode(seconds, **kind), **kind) == seconds


@pytest.mark.parametrize(
    "raw",
    [
        [0x60, 0, 0, 1, 1, 1, 0x26, 0x20],
        [0x1A, 0, 0, 1, 1, 1, 0x26, 0x20],
        [0, 0xFF, 0, 1, 1, 1, 0x26, 0x20],
        [0, 0, 0x24, 1, 1, 1, 0x26, 0x20],
        [0, 0, 0, 1, 0x31, 0x04, 0x26, 0x20],
        [0, 0, 0, 1, 0x29, 0x02, 0x26, 0x20],
        [0, 0, 0, 1, 1, 0x13, 0x26, 0x20],
        [0, 0, 0, 1, 0, 1, 0x26, 0x20],
        [0, 0, 0, 1, 1, 1, 0, 0],
    ],
)
def test_what_is_no_time_is_none(raw: list[int]) -> None:
    assert decode(raw, binary=False, hours24=True) is None


@given(st.lists(st.integers(0, 255), min_size=8, max_size=8), formats)
def test_no_bytes_whatever_raise(raw: list[int], kind: dict[str, bool]) -> None:
    decode(raw, **kind)
    Alarm.of(raw[:3], **kind)


def _slow(alarm: tuple[int | None, int | None, int | None], after: int, until: int) -> bool:
    """Each second asked, one by one."""
    hour, minute, second = alarm
    return any(
        hour in (None, each // 3600 % 24)
        and minute in (None, each // 60 % 60)
        and second in (None, each % 60)
        for each in range(after + 1, until + 1)
    )


parts = st.none() | st.integers(0, 59)


@given(st.none() | st.integers(0, 23), parts, parts, st.integers(0, 2 * DAY), st.integers(0, 4000))
def test_an_alarm_between_two_moments_is_found_as_by_asking_each_second(
    hour: int | None, minute: int | None, second: int | None, after: int, length: int
) -> None:
    found = Alarm(hour, minute, second).between(after, after + length)
    assert found == _slow((hour, minute, second), after, after + length)


def test_any_alarm_goes_off_within_a_day() -> None:
    assert Alarm(23, 59, 59).between(0, DAY)
    assert not Alarm(0, 0, 0).between(0, DAY - 1)


@pytest.mark.parametrize("raw", [[0x60, 0, 0], [0x7F, 0, 0], [0, 0xBF, 0], [0, 0, 0x24], [0, 0, 0x3F]])
def test_an_alarm_at_no_time_never_goes_off(raw: list[int]) -> None:
    assert Alarm.of(raw, binary=False, hours24=True) is None


def test_the_highest_bytes_of_an_alarm_match_anything() -> None:
    alarm = Alarm.of([0xC0, 0xFF, 0xC5], binary=False, hours24=False)
    assert alarm is not None
    assert alarm.between(100, 101)
