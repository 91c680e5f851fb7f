"""PCI vdevs in a whole machine: binding by hooks, interrupts, isolation (scripted guest, no CPU)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qvmcore import boards
from qvmcore.errors import PluginError
from qvmcore.hookspecs import hookimpl
from qvmcore.machine import Machine
from qvmcore.pci import spec
from qvmcore.pci.vdev import BarWindow, PciVdev
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import machine
from qvmcore.testing.pci import EcamConfig, enumerate_bus
from qvmcore.testing.pci_driver import PciDevice
from qvmcore.testing.samples import Echo
from qvmcore.types import MmioHandler, PciAddress, PciId, Window
from qvmcore.vdev import Vdev

PCI = boards.get("arm64-virt").pci
assert PCI is not None
ECAM, LOW = PCI.ecam[0], PCI.apertures[0][0]
DOORBELL = PCI.msi.base + 0x40


class Card(PciVdev):
    """Two BARs, two interrupts, private configuration bytes."""

    vdev_type = "card"
    pci_id = PciId(0x1234, 0x5678)
    pci_class = 0x118000
    windows: ClassVar[tuple[Window, ...]] = (
        Window(0x1000, frozenset({4})),
        BarWindow(0x2000, wide=True, prefetchable=True),
    )
    irqs = 2

    def on_configured(self) -> None:
        self.values: dict[tuple[int, int], int] = {}
        self.ctx.irq(0).set(True)  # before there is a bus

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return self.values.get((window, offset), 0x100 + window)

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        if value == 0xDEAD:
            raise RuntimeError("a broken device")
        self.values[window, offset] = value
        self.ctx.irq(offset // 4 % 2).set(bool(value))

    def config_read(self, offset: int, size: int) -> int:
        return offset

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.values[9, offset] = value


class Second(Card):
    vdev_type = "second"


def run(
    script: Callable[[ScriptedGuest], None], folder: Path, *classes: type[Vdev], **more: Any
) -> ScriptedGuest:
    """Run a machine to its end; what the script asserts is raised here."""
    problems: list[BaseException] = []

    def guarded(guest: ScriptedGuest) -> None:
        try:
            script(guest)
        except BaseException as error:
            problems.append(error)
        guest.power_off()

    engine = ScriptedEngine(guarded)
    vm: Machine = machine(classes, engine, folder, **more)
    vm.run()
    for problem in problems:
        raise problem
    assert engine.guest is not None
    return engine.guest


def found(guest: ScriptedGuest) -> dict[PciAddress, PciDevice]:
    return enumerate_bus(guest.config.bus, ECAM, LOW)


def test_a_guest_finds_and_drives_a_card(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        devices = found(guest)
        assert list(devices) == [PciAddress(0), PciAddress(1)]
        card = devices[PciAddress(1)]
        assert [card.read(at) for at in (0, 8)] == [0x56781234, 0x11800000]
        assert [card.read(at) & 0xF for at in (0x10, 0x14, 0x1C)] == [0, 0xC, 0]
        (first, _), (second, _) = card.bars[0], card.bars[1]
        assert [guest.read32(first), guest.read32(second)] == [0x100, 0x101]
        assert guest.config.bus.read(first, 2) == 0xFFFF  # not a size the window takes
        guest.write32(second + 0x1FFC, 0)
        assert [card.read(0x60), card.read(0x804)] == [0x60, 0x804]

    run(script, tmp_path, Card)


def test_intx_is_swizzled_by_device_number_and_shared(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        # Both cards asserted a level before the start: devices 1 and 5 share INTB.
        assert {number: line.level for number, line in guest.irqs.items() if number < 40} == {36: True}
        for place in (PciAddress(1), PciAddress(5)):
            guest.write32(found(guest)[place].bars[0][0], 0)
        assert not guest.irqs[36].level

    classes = [
        Card,
        Echo,
        type("A", (Echo,), {"vdev_type": "a"}),
        type("B", (Echo,), {"vdev_type": "b"}),
        Second,
    ]
    guest = run(script, tmp_path, *classes)
    assert guest.irqs[36].rises == 1


def test_msix_messages_reach_the_engine(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        card = found(guest)[PciAddress(1)]
        at = card.capabilities()[0][0]
        table = card.bars[card.read(at + 4) & 7][0]
        for vector in (0, 1):
            for word, value in enumerate((DOORBELL, 0, 112 + vector, 0)):
                guest.write32(table + 16 * vector + 4 * word, value)
        card.write(at + 2, spec.MSIX_ENABLE, 2)
        assert not guest.irqs[36].level
        guest.write32(card.bars[0][0] + 4, 1)
        assert guest.messages == [(DOORBELL, 113)]

    run(script, tmp_path, Card)


def test_a_virtio_vdev_on_pci_needs_nothing_special(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        echo = found(guest)[PciAddress(1)]
        assert echo.read(0) & 0xFFFF == 0x1AF4
        assert echo.read(0x2C, 2) == 0x1C05
        assert echo.structures()

    run(script, tmp_path, Echo, pci=True)


def test_a_broken_card_reads_all_ones_everywhere_and_the_bus_lives(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        first, second = (found(guest)[PciAddress(n)] for n in (1, 2))
        assert guest.irqs[36].level
        guest.write32(first.bars[0][0], 0xDEAD)
        assert not guest.irqs[36].level
        assert [guest.read32(first.bars[0][0]), first.read(0)] == [0xFFFFFFFF] * 2
        assert second.read(0) == 0x56781234

    run(script, tmp_path, Card, Second)


class Tracer:
    """Watches all three bind hooks."""

    def __init__(self) -> None:
        self.bound: list[object] = []
        self.reads: list[int] = []

    @hookimpl(wrapper=True)
    def qvm_bind_pci_config(self, vdev: Vdev, address: PciAddress) -> Iterator[None]:
        inner = yield
        self.bound.append((vdev.vdev_type, str(address)))

        def read(offset: int, size: int) -> int:
            self.reads.append(offset)
            return 0xBEEF if offset == 0 else inner.read(offset, size)  # type: ignore[attr-defined]

        return MmioHandler(read, inner.write)  # type: ignore[attr-defined, return-value]

    @hookimpl(wrapper=True)
    def qvm_bind_mmio(self, vdev: Vdev, index: int, window: Window) -> Iterator[None]:
        handler = yield
        self.bound.append((vdev.vdev_type, index, window.size))
        return handler

    @hookimpl(wrapper=True)
    def qvm_bind_irq(self, vdev: Vdev, index: int, intr: object) -> Iterator[None]:
        line = yield
        self.bound.append((vdev.vdev_type, index, str(intr)))
        return line


def test_every_bind_hook_sees_a_pci_vdev(tmp_path: Path) -> None:
    tracer = Tracer()

    def script(guest: ScriptedGuest) -> None:
        config = EcamConfig(guest.config.bus, ECAM, PciAddress(1))
        assert config.config_read(0, 2) == 0xBEEF

    run(script, tmp_path, Card, plugins=[tracer])
    assert tracer.bound == [
        ("card", 0, "gic:36"), ("card", 1, "gic:36"),
        ("card", 0, 0x1000), ("card", 1, 0x2000), ("card", 2, 0x1000),
        ("card", "00:01.0"),
    ]  # fmt: skip
    assert tracer.reads == [0]


class Nonsense:
    @hookimpl
    def qvm_bind_pci_config(self) -> object:
        return "nonsense"


def test_a_hook_that_gives_something_else_is_named(tmp_path: Path) -> None:
    vm = machine([Card], ScriptedEngine(lambda guest: None), tmp_path, plugins=[Nonsense()])
    with pytest.raises(PluginError, match="qvm_bind_pci_config gave 'nonsense', not an MmioHandler"):
        vm.run()


class Odd(Card):
    vdev_type = "odd"
    windows: ClassVar[tuple[Window, ...]] = (Window(0x300),)


def test_a_window_no_bar_can_be_is_an_error_that_names_the_vdev(tmp_path: Path) -> None:
    vm = machine([Odd], ScriptedEngine(lambda guest: None), tmp_path)
    with pytest.raises(PluginError, match=r"vdev odd \(odd\): BAR 0: 768 bytes; expected a power of two"):
        vm.run()


def test_no_pci_no_bus(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        assert guest.read32(ECAM) == 0xFFFFFFFF
        assert guest.config.msi is None

    run(script, tmp_path, Echo)

    def alone(guest: ScriptedGuest) -> None:
        assert list(found(guest)) == [PciAddress(0)]

    run(alone, tmp_path, pci=True)
