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
        [0, 0, 0, 1, 1, 1, 0xA6, 0x20],
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


def _parts(moment: int, used: tuple[bool, bool, bool]) -> tuple[int | None, int | None, int | None]:
    """The alarm of that moment, with any in place of the parts that are not used."""
    values = (moment // 3600 % 24, moment // 60 % 60, moment % 60)
    hour, minute, second = (value if use else None for value, use in zip(values, used, strict=True))
    return hour, minute, second


@given(
    st.integers(0, 2 * DAY), st.integers(0, 4000), st.integers(-130, 4130), st.tuples(*[st.booleans()] * 3)
)
def test_an_alarm_between_two_moments_is_found_as_by_asking_each_second(
    after: int, length: int, distance: int, used: tuple[bool, bool, bool]
) -> None:
    """The alarm is near, or even on, one of the ends."""
    alarm = _parts(after + distance, used)
    assert Alarm(*alarm).between(after, after + length) == _slow(alarm, after, after + length)


@pytest.mark.parametrize("after", [0, 59, 3600, 86399, 100000])
@pytest.mark.parametrize("distance", [-1, 0, 1, 59, 60, 61, 120, 121])
def test_an_alarm_at_either_end(after: int, distance: int) -> None:
    alarm = _parts(after + distance, (True, True, True))
    assert Alarm(*alarm).between(after, after + 120) == (0 < distance <= 120)


def test_any_alarm_goes_off_within_a_day() -> None:
    assert Alarm(23, 59, 59).between(0, DAY)
    assert not Alarm(0, 0, 0).between(0, DAY - 1)


@pytest.mark.parametrize("raw", [[0x60, 0, 0], [0x7F, 0, 0], [0, 0xBF, 0], [0, 0, 0x24], [0, 0, 0x3F]])
def test_an_alarm_at_no_time_never_goes_off(raw: list[int]) -> None:
    assert Alarm.of(raw, binary=False, hours24=True) is None


@pytest.mark.parametrize("place", range(3))
def test_each_byte_of_an_alarm_has_its_place(place: int) -> None:
    raw = [0xFF] * 3
    raw[place] = 0x11
    alarm = Alarm.of(raw, binary=False, hours24=True)
    assert alarm is not None
    start = (11, 11 * 60, 11 * 3600)[place]
    assert not alarm.between(start - 2, start - 1)
    assert alarm.between(start - 1, start)


def test_the_highest_bytes_of_an_alarm_match_anything() -> None:
    alarm = Alarm.of([0xC0, 0xFF, 0xC5], binary=False, hours24=False)
    assert alarm is not None
    assert alarm.between(100, 101)
