"""The MSI frame: what a device's message and a CPU's store to it do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from qvm_emulator.cpu import Cpu
from qvm_emulator.gicv2 import GICC_CTLR, GICC_IAR, GICC_PMR, GICD_ISENABLER, GicV2
from qvm_emulator.gicv2m import MSI_IIDR, MSI_SETSPI_NS, MSI_TYPER, GicV2m
from qvm_emulator.guest import EmulatedGuest
from qvm_emulator.trial import GIC

from qvmcore.api import AddressSpace, EngineError, GuestConfig, GuestMemory, MsiFrame

BASE = 0x0802_0000
SPIS = range(112, 240)


def controller() -> tuple[GicV2, GicV2m]:
    """A controller that delivers everything, and its frame."""
    gic = GicV2(288)
    gic.dist_write(0, 4, 1)
    for word in range(9):
        gic.dist_write(GICD_ISENABLER + 4 * word, 4, 0xFFFFFFFF)
    gic.cpu_write(GICC_CTLR, 4, 1)
    gic.cpu_write(GICC_PMR, 4, 0xFF)
    return gic, GicV2m(gic, BASE, 0x1000, SPIS)


def delivered(gic: GicV2) -> list[int]:
    """Acknowledge until nothing is left (all of one priority, so one by one)."""
    found = []
    while (intid := gic.cpu_read(GICC_IAR, 4)) != 1023:
        found.append(intid)
        gic.end_of_interrupt(intid)
    return found


def test_a_message_makes_its_line_pending() -> None:
    gic, frame = controller()
    frame.message(BASE + MSI_SETSPI_NS, 112)
    frame.message(BASE + MSI_SETSPI_NS, 239)
    assert delivered(gic) == [112, 239]


@pytest.mark.parametrize(
    ("address", "data"),
    [
        (BASE + MSI_SETSPI_NS, 111), (BASE + MSI_SETSPI_NS, 240), (BASE + MSI_SETSPI_NS, 0),
        (BASE + MSI_SETSPI_NS, 33), (BASE + MSI_SETSPI_NS, 1023), (BASE, 112), (BASE + 0x44, 112),
        (0x4000_0000, 112), (BASE + MSI_SETSPI_NS + (1 << 32), 112),
    ],
)  # fmt: skip
def test_a_message_elsewhere_or_of_another_line_is_dropped(address: int, data: int) -> None:
    gic, frame = controller()
    frame.message(address, data)
    assert delivered(gic) == []


def test_registers() -> None:
    gic, frame = controller()
    assert frame.read(MSI_TYPER, 4) == 112 << 16 | 128
    assert frame.read(MSI_IIDR, 4) == 0x43B
    assert [frame.read(MSI_TYPER, 2), frame.read(MSI_SETSPI_NS, 4), frame.read(0x100, 4)] == [0, 0, 0]
    frame.write(MSI_SETSPI_NS, 4, 120)
    frame.write(MSI_SETSPI_NS, 2, 121)
    frame.write(MSI_SETSPI_NS, 1, 122)
    frame.write(MSI_TYPER, 4, 123)
    assert delivered(gic) == [120, 121]


def _guest(msi: MsiFrame | None, cpu_class: type[Cpu]) -> EmulatedGuest:
    gic = replace(GIC, lines=range(32, 288))
    config = GuestConfig("aarch64", 1, GuestMemory(), AddressSpace(), (gic,), lambda end: None, msi)
    return EmulatedGuest(config, cpu_class)


FRAME = MsiFrame("gicv2m", "gic", BASE, 0x1000, SPIS)


def test_the_guest_has_the_frame_it_was_given(cpu_class: type[Cpu]) -> None:
    guest = _guest(FRAME, cpu_class)
    guest.signal_msi(BASE + MSI_SETSPI_NS, 112)
    assert guest._gic.dist_read(0x200 + 4 * 3, 4) == 1 << 16
    guest.close()
    without = _guest(None, cpu_class)
    without.signal_msi(BASE + MSI_SETSPI_NS, 112)
    assert without._gic.dist_read(0x200 + 4 * 3, 4) == 0
    without.close()


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (replace(FRAME, kind="its"), "MSI frames of the kind gicv2m, not its"),
        (replace(FRAME, lines=range(16, 40)), "not shared interrupts"),
        (replace(FRAME, lines=range(280, 300)), "not shared interrupts"),
    ],
)
def test_a_frame_the_engine_cannot_have(frame: MsiFrame, text: str, cpu_class: type[Cpu]) -> None:
    with pytest.raises(EngineError, match=text):
        _guest(frame, cpu_class)
