"""The interrupt controller alone."""

from __future__ import annotations

import pytest
from qvm_emulator.gicv2 import (
    GICC_BPR,
    GICC_CTLR,
    GICC_DIR,
    GICC_EOIR,
    GICC_HPPIR,
    GICC_IAR,
    GICC_IIDR,
    GICC_PMR,
    GICC_RPR,
    GICD_CPENDSGIR,
    GICD_CTLR,
    GICD_ICFGR,
    GICD_ICPIDR2,
    GICD_IPRIORITYR,
    GICD_ISENABLER,
    GICD_ITARGETSR,
    GICD_SGIR,
    GICD_SPENDSGIR,
    GICD_TYPER,
    SPURIOUS,
    GicV2,
)

CLEAR = 0x80  # distance from a set register to its clear register
PENDING, ACTIVE = 0x200, 0x300


class Rig:
    """A controller whose output is recorded, with everything switched on."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.gic = GicV2(128, self.levels.append)
        self.dist(GICD_CTLR, 1)
        self.cpu(GICC_CTLR, 1)
        self.cpu(GICC_PMR, 0xFF)
        for word in range(4):
            self.dist(GICD_ISENABLER + 4 * word, 0xFFFF_FFFF)
        for intid in range(0, 128, 4):
            self.dist(GICD_IPRIORITYR + intid, 0xA0A0A0A0)

    def dist(self, offset: int, value: int, size: int = 4) -> None:
        self.gic.dist_write(offset, size, value)

    def cpu(self, offset: int, value: int) -> None:
        self.gic.cpu_write(offset, 4, value)

    def edge(self, intid: int) -> None:
        offset = GICD_ICFGR + intid // 16 * 4
        self.dist(offset, self.gic.dist_read(offset, 4) | 2 << 2 * (intid % 16))

    def priority(self, intid: int, value: int) -> None:
        self.dist(GICD_IPRIORITYR + intid, value, 1)

    def take(self) -> int:
        return self.gic.cpu_read(GICC_IAR, 4)

    def finish(self, intid: int) -> None:
        self.cpu(GICC_EOIR, intid)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_level_line_stays_pending_until_it_drops(rig: Rig) -> None:
    rig.gic.set_line(40, True)
    assert rig.levels == [True]
    assert rig.take() == 40
    assert rig.levels == [True, False]  # active: not signalled again
    rig.finish(40)
    assert rig.levels[-1] is True  # still high
    assert rig.take() == 40
    rig.gic.set_line(40, False)
    rig.finish(40)
    assert rig.levels[-1] is False
    assert rig.take() == SPURIOUS


def test_edge_line_signals_once_per_rising_edge(rig: Rig) -> None:
    rig.edge(40)
    rig.gic.set_line(40, True)
    rig.gic.set_line(40, True)
    assert rig.take() == 40
    rig.finish(40)
    assert rig.take() == SPURIOUS
    rig.gic.set_line(40, False)
    assert rig.take() == SPURIOUS
    rig.gic.set_line(40, True)
    assert rig.take() == 40


def test_edge_while_active_becomes_pending_again(rig: Rig) -> None:
    rig.edge(40)
    rig.gic.pulse(40)
    assert rig.take() == 40
    rig.gic.pulse(40)
    rig.gic.pulse(40)
    rig.finish(40)
    assert rig.take() == 40
    rig.finish(40)
    assert rig.take() == SPURIOUS


def test_pulse_on_a_level_line_is_not_lost(rig: Rig) -> None:
    rig.gic.pulse(41)
    assert rig.take() == 41
    rig.finish(41)
    assert rig.take() == SPURIOUS


def test_level_dropped_before_acknowledge_is_spurious(rig: Rig) -> None:
    rig.gic.set_line(40, True)
    rig.gic.set_line(40, False)
    assert rig.levels == [True, False]
    assert rig.take() == SPURIOUS


def test_best_priority_then_lowest_number(rig: Rig) -> None:
    for intid in (50, 44, 60):
        rig.gic.pulse(intid)
    rig.priority(60, 0x20)
    assert rig.gic.cpu_read(GICC_HPPIR, 4) == 60
    order = []
    for _ in range(3):
        order.append(rig.take())
        rig.finish(order[-1])
    assert order == [60, 44, 50]


def test_preemption_by_group_priority(rig: Rig) -> None:
    rig.cpu(GICC_BPR, 3)  # groups of 16
    rig.priority(40, 0x80)
    rig.priority(41, 0x84)
    rig.priority(42, 0x40)
    rig.gic.pulse(41)
    assert rig.take() == 41
    assert rig.gic.cpu_read(GICC_RPR, 4) == 0x80
    rig.gic.pulse(40)
    assert rig.take() == SPURIOUS  # same group: no preemption
    rig.gic.pulse(42)
    assert rig.take() == 42
    rig.finish(42)
    assert rig.gic.cpu_read(GICC_RPR, 4) == 0x80
    rig.finish(41)
    assert rig.take() == 40
    rig.finish(40)
    assert rig.gic.cpu_read(GICC_RPR, 4) == 0xFF


def test_priority_mask(rig: Rig) -> None:
    rig.cpu(GICC_PMR, 0xA0)
    rig.gic.pulse(40)
    assert rig.levels == []
    rig.cpu(GICC_PMR, 0xA1)
    assert rig.levels == [True]


def test_disabled_distributor_signals_nothing(rig: Rig) -> None:
    rig.dist(GICD_CTLR, 0)
    rig.gic.pulse(40)
    assert rig.take() == SPURIOUS
    rig.dist(GICD_CTLR, 1)
    assert rig.take() == 40


def test_disabled_cpu_interface_signals_nothing(rig: Rig) -> None:
    rig.cpu(GICC_CTLR, 0)
    rig.gic.pulse(40)
    assert rig.take() == SPURIOUS
    rig.cpu(GICC_CTLR, 1)
    assert rig.take() == 40


def test_enable_bits(rig: Rig) -> None:
    rig.dist(GICD_ISENABLER + 4 + CLEAR, 1 << 8)
    assert rig.gic.dist_read(GICD_ISENABLER + 4, 4) == 0xFFFF_FEFF
    rig.gic.pulse(40)
    assert rig.take() == SPURIOUS
    rig.dist(GICD_ISENABLER + 4, 1 << 8)
    assert rig.take() == 40
    rig.dist(GICD_ISENABLER + CLEAR, 0xFFFF_FFFF)
    assert rig.gic.dist_read(GICD_ISENABLER, 4) == 0xFFFF  # SGIs stay enabled


def test_pending_bits(rig: Rig) -> None:
    rig.dist(PENDING + 4, 1 << 9)
    assert rig.gic.dist_read(PENDING + 4, 4) == 1 << 9
    rig.dist(PENDING + 4 + CLEAR, 1 << 9)
    assert rig.take() == SPURIOUS
    rig.gic.set_line(41, True)
    rig.dist(PENDING + 4 + CLEAR, 1 << 9)
    assert rig.gic.dist_read(PENDING + 4, 4) == 1 << 9  # a high level line cannot be cleared


def test_active_bits(rig: Rig) -> None:
    rig.gic.pulse(40)
    rig.take()
    assert rig.gic.dist_read(ACTIVE + 4, 4) == 1 << 8
    rig.finish(40)
    assert rig.gic.dist_read(ACTIVE + 4, 4) == 0


def test_eoimode_splits_drop_and_deactivate(rig: Rig) -> None:
    rig.cpu(GICC_CTLR, 1 | 1 << 9)
    rig.gic.set_line(40, True)
    assert rig.take() == 40
    rig.finish(40)
    assert rig.take() == SPURIOUS  # dropped, but still active
    rig.gic.pulse(41)
    assert rig.take() == 41
    rig.finish(41)
    rig.cpu(GICC_DIR, 41)
    rig.cpu(GICC_DIR, 40)
    assert rig.take() == 40


def test_software_interrupts(rig: Rig) -> None:
    rig.dist(GICD_SGIR, 1 << 16 | 3)
    assert rig.take() == 3
    rig.finish(3)
    rig.dist(GICD_SGIR, 1 << 24 | 1 << 16 | 4)  # all but this CPU: nobody
    assert rig.take() == SPURIOUS
    rig.dist(GICD_SGIR, 2 << 24 | 5)  # this CPU
    assert rig.gic.dist_read(GICD_SPENDSGIR + 5, 1) == 1
    rig.dist(GICD_CPENDSGIR + 5, 1, 1)
    assert rig.take() == SPURIOUS
    rig.dist(GICD_SPENDSGIR + 4, 0x0100, 4)
    assert rig.take() == 5


def test_private_interrupts(rig: Rig) -> None:
    rig.gic.set_line(27, True)
    assert rig.take() == 27


def test_identification(rig: Rig) -> None:
    assert rig.gic.dist_read(GICD_TYPER, 4) == 3  # 128 lines, one CPU
    assert rig.gic.dist_read(GICD_ICPIDR2, 4) >> 4 == 2
    assert rig.gic.cpu_read(GICC_IIDR, 4) >> 16 & 0xF == 2
    assert rig.gic.dist_read(GICD_ITARGETSR + 40, 4) == 0  # read as zero with one CPU


def test_priority_bytes_and_out_of_range(rig: Rig) -> None:
    rig.dist(GICD_IPRIORITYR + 40, 0x11223344)
    assert rig.gic.dist_read(GICD_IPRIORITYR + 42, 1) == 0x22
    rig.dist(GICD_IPRIORITYR + 0x300, 0x55555555)
    assert rig.gic.dist_read(GICD_IPRIORITYR + 0x300, 4) == 0
    rig.finish(1023)
    rig.finish(1000)
    rig.cpu(GICC_DIR, 1000)


def test_number_of_lines_is_checked() -> None:
    with pytest.raises(ValueError, match="33 to 1020"):
        GicV2(2000)
