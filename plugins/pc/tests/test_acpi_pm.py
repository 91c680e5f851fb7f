"""acpi-pm against ACPI 6.5, 4.8.3, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_pc.acpi_pm import (
    CONTROL_SCI_EN,
    CONTROL_SLP_EN,
    EVENT_BUTTON,
    EVENT_TIMER,
    HALF,
    PM1_CONTROL,
    PM1_ENABLE,
    PM1_STATUS,
    PM_TIMER_HZ,
    RESET,
    TIMER,
    AcpiPm,
)

from qvmcore.testing.fakes import Plugged, plug


class Still(AcpiPm):
    """Its clock goes on when the test says so."""

    now = 1000.0

    @classmethod
    def clock(cls) -> float:
        return cls.now


@pytest.fixture
def pm() -> Iterator[Plugged[Still]]:
    Still.now = 1000.0
    with plug(Still) as pm:
        yield pm
        assert pm.ctx.faults == []


def test_4_8_3_2_1_the_system_is_in_acpi_mode_for_good(pm: Plugged[Still]) -> None:
    assert pm.read(PM1_CONTROL, 2) == CONTROL_SCI_EN
    pm.write(PM1_CONTROL, 0, 2)
    assert pm.read(PM1_CONTROL, 2) == CONTROL_SCI_EN


def test_4_8_3_1_the_button_sets_its_status_and_holds_the_sci_until_it_is_cleared(pm: Plugged[Still]) -> None:
    pm.write(PM1_ENABLE, EVENT_BUTTON, 2)
    assert not pm.irq.level
    assert pm.vdev.on_button()
    pm.settle()
    assert pm.irq.level
    assert pm.read(PM1_STATUS, 2) == EVENT_BUTTON
    pm.write(PM1_STATUS, 0x00FF, 2)
    assert pm.irq.level, "other ones do not clear it"
    pm.write(PM1_STATUS, EVENT_BUTTON, 2)
    assert not pm.irq.level
    assert pm.read(PM1_STATUS, 2) == 0
    assert pm.vdev.status()["presses"] == 1


def test_a_button_the_guest_has_not_enabled_is_refused_so_that_the_power_is_cut(pm: Plugged[Still]) -> None:
    assert not pm.vdev.on_button()
    pm.settle()
    assert pm.read(PM1_STATUS, 2) == 0


def test_disabling_and_enabling_an_event_drops_and_raises_the_sci(pm: Plugged[Still]) -> None:
    pm.write(PM1_ENABLE, EVENT_BUTTON, 2)
    pm.vdev.on_button()
    pm.settle()
    pm.write(PM1_ENABLE, 0, 2)
    assert not pm.irq.level
    pm.write(PM1_ENABLE, EVENT_BUTTON, 2)
    assert pm.irq.level


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_register_can_be_read_and_written_in_pieces(pm: Plugged[Still], size: int) -> None:
    for offset in range(0, 4, size):
        pm.write(PM1_STATUS + offset, (EVENT_BUTTON << 16 >> 8 * offset) & (1 << 8 * size) - 1, size)
    got = sum(pm.read(offset, size) << 8 * offset for offset in range(0, 4, size))
    assert got == EVENT_BUTTON << 16


def test_reserved_enable_bits_stay_zero(pm: Plugged[Still]) -> None:
    pm.write(PM1_ENABLE, 0xFFFF, 2)
    assert pm.read(PM1_ENABLE, 2) == 0x0721


@pytest.mark.parametrize("size", [1, 2])
def test_4_8_3_2_1_sleep_type_5_is_power_off(pm: Plugged[Still], size: int) -> None:
    """Drivers write the type first, then the type with the enable bit."""
    shift = 8 * (2 - size)
    for value in (5 << 10, 5 << 10 | CONTROL_SLP_EN):
        assert pm.ctx.shutdowns == []
        pm.write(PM1_CONTROL + 2 - size, value >> shift, size)
    assert pm.ctx.shutdowns == [("the guest powered off", 0)]
    assert pm.read(PM1_CONTROL, 2) == 5 << 10 | CONTROL_SCI_EN, "SLP_EN reads as zero"


def test_a_write_of_the_low_byte_of_control_does_not_sleep_again(pm: Plugged[Still]) -> None:
    pm.write(PM1_CONTROL, 5 << 10, 2)
    pm.write(PM1_CONTROL, 0xFF, 1)
    assert pm.ctx.shutdowns == []
    assert pm.read(PM1_CONTROL, 2) == 5 << 10 | CONTROL_SCI_EN


def test_other_sleep_types_are_ignored_and_told_once(
    pm: Plugged[Still], caplog: pytest.LogCaptureFixture
) -> None:
    for kind in (0, 1, 1, 1, 7):
        pm.write(PM1_CONTROL, kind << 10 | CONTROL_SLP_EN, 2)
    assert pm.ctx.shutdowns == []
    assert [f"sleep type {kind} " in caplog.text for kind in range(8)] == [
        kind in (0, 1, 7) for kind in range(8)
    ]
    assert len(caplog.records) == 3


def test_4_8_4_6_the_reset_register_takes_one_value(pm: Plugged[Still]) -> None:
    for value in (0, 2, 6, 0x81, 0xFF):
        pm.write(RESET, value, 1)
    assert pm.ctx.resets == []
    pm.write(RESET, 1, 1)
    assert pm.ctx.resets == ["the guest wrote to the reset register"]
    assert pm.ctx.shutdowns == []


def test_4_8_3_3_the_timer_counts_3579545_a_second_and_wraps_at_32_bits(pm: Plugged[Still]) -> None:
    assert pm.read(TIMER) == 0
    Still.now += 1
    assert pm.read(TIMER) == PM_TIMER_HZ
    Still.now += 1200
    assert pm.read(TIMER) == PM_TIMER_HZ * 1201 % (1 << 32)
    pm.write(TIMER, 0)
    assert pm.read(TIMER) == PM_TIMER_HZ * 1201 % (1 << 32)


def test_4_8_3_3_a_change_of_the_timers_highest_bit_sets_its_status(pm: Plugged[Still]) -> None:
    Still.now += HALF / PM_TIMER_HZ - 1
    assert pm.read(PM1_STATUS, 2) == 0
    Still.now += 2
    assert pm.read(PM1_STATUS, 2) == EVENT_TIMER
    pm.write(PM1_STATUS, EVENT_TIMER, 2)
    assert pm.read(PM1_STATUS, 2) == 0
    Still.now += HALF / PM_TIMER_HZ
    assert pm.read(PM1_STATUS, 2) == EVENT_TIMER
    pm.write(PM1_ENABLE, EVENT_TIMER, 2)
    assert pm.irq.level


def test_events_do_not_take_back_each_other(pm: Plugged[Still]) -> None:
    pm.write(PM1_ENABLE, EVENT_BUTTON, 2)
    Still.now += 599
    assert pm.read(PM1_STATUS, 2) == 0
    Still.now += 1  # 2**31 ticks are 599.93 s
    assert pm.read(PM1_STATUS, 2) == 0x001
    pm.vdev.on_button()
    pm.settle()
    assert pm.read(PM1_STATUS, 2) == 0x101
    Still.now += 600
    assert pm.read(PM1_STATUS, 2) == 0x101
    pm.write(PM1_STATUS, EVENT_TIMER, 2)
    Still.now += 600
    assert pm.read(PM1_STATUS, 2) == 0x101


def test_the_timer_interrupts_a_guest_that_does_not_ask(pm: Plugged[Still]) -> None:
    Still.now += HALF / PM_TIMER_HZ - 0.01
    pm.write(PM1_ENABLE, EVENT_TIMER, 2)
    assert not pm.irq.level
    Still.now += 0.02
    assert pm.irq.wait(1), "by the worker's timer"
    pm.settle()
    assert len(pm.ctx.worker._timers) == 1, "and for the next change there is another one"


def test_a_guest_that_enables_the_timer_again_and_again_starts_one_timer(pm: Plugged[Still]) -> None:
    for _ in range(100):
        pm.write(PM1_ENABLE, EVENT_TIMER, 2)
        pm.write(PM1_ENABLE, 0, 2)
    assert len(pm.ctx.worker._timers) == 1


def test_registers_are_where_the_board_announces_them(pm: Plugged[Still]) -> None:
    """In numbers, for a name could be wrong on both sides."""
    pm.write(2, 0x0100, 2)
    assert pm.vdev.on_button()
    pm.settle()
    Still.now += 2
    pm.write(4, 0x1400, 2)
    assert [pm.read(offset) for offset in (0, 4, 8, 12)] == [0x0100_0100, 0x1401, 2 * 3579545, 0]
    pm.write(12, 1, 1)
    pm.write(4, 0x3400, 2)
    assert (len(pm.ctx.resets), len(pm.ctx.shutdowns)) == (1, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 15), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)), max_size=40
    )
)
def test_any_register_traffic_is_harmless(accesses: list[tuple[int, int, int]]) -> None:
    with plug(AcpiPm) as pm:
        for offset, size, value in accesses:
            pm.write(offset, value & (1 << 8 * size) - 1, size)
            assert 0 <= pm.read(offset, size) < 1 << (8 * size)
        assert pm.ctx.faults == []
