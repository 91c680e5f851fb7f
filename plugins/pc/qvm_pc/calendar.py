"""Time of day as an MC146818 holds it: binary or BCD, 24 or 12 hours, a year in two bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

DAY = 86400
#: Alarm bytes from here on match anything.
ANY = 0xC0
_PM = 0x80


def encode(seconds: int, *, binary: bool, hours24: bool) -> list[int]:
    """Second, minute, hour, weekday, day, month, year and century of ``seconds`` since 1970."""
    now = time.gmtime(seconds)
    century, year = divmod(now.tm_year, 100)
    hour = now.tm_hour if hours24 else now.tm_hour % 12 or 12
    weekday = (now.tm_wday + 1) % 7 + 1  # Sunday is 1
    values = (now.tm_sec, now.tm_min, hour, weekday, now.tm_mday, now.tm_mon, year, century % 100)
    raw = [value if binary else to_bcd(value) for value in values]
    if not hours24 and now.tm_hour >= 12:
        raw[2] |= _PM
    return raw


def decode(raw: Sequence[int], *, binary: bool, hours24: bool) -> int | None:
    """Seconds since 1970 of bytes in the order of :func:`encode`; None for what is no date and time.

    The weekday is not looked at: it follows from the date.
    """
    hour = decode_hour(raw[2], binary=binary, hours24=hours24)
    numbers = [value if binary else from_bcd(value) for value in (*raw[:2], *raw[4:])]
    if hour is None or None in numbers:
        return None
    second, minute, day, month, year, century = (number or 0 for number in numbers)
    try:
        when = datetime(century * 100 + year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    return int(when.timestamp())


def decode_hour(raw: int, *, binary: bool, hours24: bool) -> int | None:
    """0 to 23, or None for an hour that does not exist."""
    if hours24:
        hour = raw if binary else from_bcd(raw)
        return hour if hour is not None and hour < 24 else None
    hour = raw & ~_PM if binary else from_bcd(raw & ~_PM)
    if hour is None or not 1 <= hour <= 12:
        return None
    return hour % 12 + (12 if raw & _PM else 0)


def to_bcd(value: int) -> int:
    """0 to 99 as two decimal digits."""
    return value // 10 << 4 | value % 10


def from_bcd(value: int) -> int | None:
    """Two decimal digits as a number, or None when one of them is none."""
    high, low = divmod(value, 16)
    return high * 10 + low if high < 10 and low < 10 else None


class Alarm:
    """The seconds of a day at which an alarm goes off; each part is a number, or None for any."""

    def __init__(self, hour: int | None, minute: int | None, second: int | None) -> None:
        self._hour, self._minute, self._second = hour, minute, second

    @classmethod
    def of(cls, raw: Sequence[int], *, binary: bool, hours24: bool) -> Alarm | None:
        """From the bytes second, minute, hour; None when it can never go off."""
        parts = [
            raw[0] if binary else from_bcd(raw[0]),
            raw[1] if binary else from_bcd(raw[1]),
            decode_hour(raw[2], binary=binary, hours24=hours24),
        ]
        for value, part in zip(raw, parts, strict=True):
            if value < ANY and (part is None or part > 59):
                return None
        second, minute, hour = (
            None if value >= ANY else part for value, part in zip(raw, parts, strict=True)
        )
        return cls(hour, minute, second)

    def between(self, after: int, until: int) -> bool:
        """Whether it goes off in (after, until], seconds since 1970; asks at most a day's minutes."""
        if until - after >= DAY:
            return True
        for start in range(after // 60 * 60, until + 1, 60):
            minute = start // 60 % 60
            if self._hour not in (None, start // 3600 % 24) or self._minute not in (None, minute):
                continue
            first, last = max(start, after + 1), min(start + 59, until)
            if first <= last if self._second is None else first <= start + self._second <= last:
                return True
        return False
