"""pl061 against DDI 0190, and the power button."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_primecell.pl061 import DIR, IBE, IC, IE, IEV, IS, MIS, RIS, Pl061

from qvmcore.testing.fakes import Plugged, plug

BUTTON = 1 << 3


def press(gpio: Plugged[Pl061]) -> bool:
    told = gpio.vdev.on_button()
    gpio.settle()
    return told


def test_identification_registers() -> None:
    with plug(Pl061) as gpio:
        assert [gpio.read(0xFE0 + 4 * i) for i in range(8)] == [0x61, 0x10, 0x04, 0, 0x0D, 0xF0, 0x05, 0xB1]


def test_data_writes_reach_masked_output_bits_only() -> None:
    with plug(Pl061) as gpio:
        gpio.write(DIR, 0x0F)
        gpio.write(0x3FC, 0xFF)
        assert gpio.read(0x3FC) == 0x0F
        gpio.write(0x05 << 2, 0x00)
        assert gpio.read(0x3FC) == 0x0A
        assert gpio.read(0x02 << 2) == 0x02


def test_button_with_a_driver_interrupts_on_both_edges() -> None:
    with plug(Pl061) as gpio:
        gpio.write(IBE, BUTTON)
        gpio.write(IE, BUTTON)
        assert press(gpio)
        assert gpio.irq.wait(1)
        assert gpio.read(MIS) == BUTTON
        assert gpio.read(0x3FC) & BUTTON
        gpio.write(IC, BUTTON)
        assert not gpio.irq.level
        assert gpio.irq.wait(2)  # the release, PRESS_SECONDS later
        assert not gpio.read(0x3FC) & BUTTON


def test_button_without_a_driver_is_refused_so_the_power_is_cut_at_once() -> None:
    with plug(Pl061) as gpio:
        assert not press(gpio)
        assert gpio.vdev.presses == 0


def test_rising_edge_only_and_masked_raw_status() -> None:
    with plug(Pl061) as gpio:
        gpio.write(IEV, BUTTON)
        gpio.vdev._drive(True)
        assert (gpio.read(RIS), gpio.read(MIS), gpio.irq.level) == (BUTTON, 0, False)
        gpio.write(IC, BUTTON)
        gpio.vdev._drive(False)
        assert gpio.read(RIS) == 0


def test_level_sense_follows_the_line() -> None:
    with plug(Pl061) as gpio:
        gpio.write(IS, BUTTON)
        gpio.write(IEV, BUTTON)
        gpio.write(IE, BUTTON)
        gpio.vdev._drive(True)
        assert gpio.irq.level
        gpio.write(IC, BUTTON)
        assert gpio.irq.level
        gpio.vdev._drive(False)
        assert not gpio.irq.level


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)), max_size=40
    )
)
def test_any_register_traffic_is_harmless(accesses: list[tuple[int, int, int]]) -> None:
    with plug(Pl061) as gpio:
        for offset, size, value in accesses:
            gpio.write(offset, value, size)
            assert 0 <= gpio.read(offset, size) < 1 << (8 * size)
        assert gpio.ctx.faults == []
