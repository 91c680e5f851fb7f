"""mc146818 behind its two ports: options, the interrupt line, and timers that do not pile up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from qvm_pc.mc146818 import DATA, INDEX, Mc146818
from qvm_pc.rtc import B_24H, B_PIE, B_SET, B_UIE, HOURS, MINUTES, MONTH, SECONDS, A, B, C

from qvmcore.api import ConfigError
from qvmcore.testing.fakes import Plugged, plug

#: Sunday, 22 November 2026, 13:08:09 UTC.
START = 1795352889


class Still(Mc146818):
    """Its clock goes on when the test says so."""

    now = float(START)

    @classmethod
    def clock(cls) -> float:
        return cls.now


@pytest.fixture(autouse=True)
def _fresh_clock() -> Iterator[None]:
    yield
    Still.now = float(START)


def get(rtc: Plugged[Mc146818], index: int) -> int:
    rtc.write(INDEX, index, 1)
    return rtc.read(DATA, 1)


def put(rtc: Plugged[Mc146818], index: int, value: int) -> None:
    rtc.write(INDEX, index, 1)
    rtc.write(DATA, value, 1)


def test_the_index_has_seven_bits_and_cannot_be_read() -> None:
    with plug(Still) as rtc:
        assert get(rtc, 0x80 | HOURS) == 0x13
        assert rtc.read(INDEX, 1) == 0xFF


def test_it_has_two_ports() -> None:
    assert [window.size for window in Mc146818.windows] == [2]
    with plug(Still) as rtc:
        assert rtc.read(DATA, 1) == 0x09, "the index is 0 at first"


def test_it_shows_the_hosts_utc() -> None:
    with plug(Mc146818) as rtc:
        put(rtc, B, B_24H | 4)  # binary
        before = time.gmtime()
        shown = get(rtc, MINUTES)
        assert shown in (before.tm_min, time.gmtime().tm_min)


def test_local_time_and_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XXX-05:30")  # east of Greenwich
    time.tzset()
    try:
        with plug(Still, time="local", offset=-60) as rtc:
            assert (get(rtc, HOURS), get(rtc, MINUTES)) == (0x18, 0x37)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("reg", ["0x10,0x40", ["0x10,0x40", "0x11, 7", "0,0", "0x7f,0xff"]])
def test_bytes_set_at_power_on(reg: object) -> None:
    with plug(Still, reg=reg) as rtc:
        assert get(rtc, 0x10) == 0x40
        assert get(rtc, 0x11) == (0 if isinstance(reg, str) else 7)


def test_qnxs_example_of_a_register_preset() -> None:
    """0x0b,0x02: 24 hours, BCD, no interrupt."""
    with plug(Still, reg="0x0b,0x02") as rtc:
        assert get(rtc, B) == 0x02


@pytest.mark.parametrize("reg", ["", "1", "0x80,0", "1,256", "1,2,3", "-1,0", ["one,two"]])
def test_a_malformed_preset_says_what_is_expected(reg: object) -> None:
    with pytest.raises(ConfigError, match="INDEX,VALUE"):
        plug(Still, reg=reg)


def test_reading_register_c_drops_the_line() -> None:
    with plug(Still) as rtc:
        put(rtc, A, 0x20)
        put(rtc, B, B_24H | B_UIE)
        Still.now += 1
        assert get(rtc, SECONDS) == 0x10
        assert rtc.irq.level
        assert get(rtc, C) == 0x90
        assert not rtc.irq.level


def test_a_timer_raises_the_line_while_the_guest_does_something_else() -> None:
    with plug(Mc146818) as rtc:
        put(rtc, A, 0x26)
        put(rtc, B, B_24H | B_PIE)
        for count in range(1, 4):
            assert rtc.irq.wait(count)
            assert rtc.irq.count == count, "no further one until the guest has taken notice"
            assert get(rtc, C) & 0xC0 == 0xC0
        put(rtc, B, B_24H)


def test_a_guest_that_enables_again_and_again_does_not_pile_up_timers() -> None:
    with plug(Still) as rtc:
        for round_ in range(2000):
            put(rtc, A, 0x20 | 3 + round_ % 13)
            put(rtc, B, B_24H | (B_PIE, B_UIE)[round_ & 1])
            put(rtc, B, B_24H)
        assert len(rtc.vdev._timers) <= 16
        assert rtc.vdev._timers == sorted(rtc.vdev._timers, reverse=True)


def test_a_time_that_does_not_exist_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with plug(Still) as rtc:
        put(rtc, MONTH, 0x12)
        assert caplog.text == ""
        for _ in range(3):
            put(rtc, MONTH, 0x13)
        put(rtc, B, B_24H | B_SET)
        put(rtc, MONTH, 0x13)
        put(rtc, B, B_24H)
    assert caplog.text.count("a time that does not exist") == 1


def test_status_says_the_time() -> None:
    with plug(Still, offset=5) as rtc:
        assert rtc.vdev.status() == {"time": START + 5, "interrupt": False}
