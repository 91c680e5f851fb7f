"""A PciVdev of which only the instance knows the BARs, the vectors and the pin."""

from __future__ import annotations

from collections.abc import Sequence

from qvmcore.api import BarWindow, DirectPart, PciFunction, PciId, PciVdev, Window
from qvmcore.pci import spec
from qvmcore.testing.fakes import Plugged, plug


class Late(PciVdev):
    """Decides in on_configured."""

    vdev_type = "late"
    irqs = 1
    msix = False
    pci_id = PciId(0x1234, 1)
    pci_class = 0xFF0000
    part = DirectPart(0x1000, 0x1000, 0x7000_0000)

    def on_configured(self) -> None:
        self.vectors, self.intx = 3, False
        self.seen: list[tuple[str, bool]] = []

    def bars(self) -> Sequence[Window]:
        return [BarWindow(0x2000, number=1, direct=(self.part,)), BarWindow(0x1000, wide=True, number=4)]

    def on_function(self, function: PciFunction) -> None:
        self.function = function
        function.on_bus_master = lambda on: self.seen.append(("master", on))
        function.interrupts.on_msix = lambda on: self.seen.append(("msix", on))

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return window << 8 | offset


def device_of(plugged: Plugged[Late]) -> PciFunction:
    return plugged.vdev.function


def test_bars_have_the_numbers_asked_for_and_msix_the_first_free_one() -> None:
    with plug(Late) as plugged:
        assert [bar.number for bar in device_of(plugged).bars] == [1, 4, 0]
        assert plugged.device is not None
        base = plugged.device.bars[4][0]
        assert plugged.bus.read(base + 8, 4) == 0x108


def test_the_vectors_and_the_pin_are_the_instance_s() -> None:
    with plug(Late) as plugged:
        function = device_of(plugged)
        assert function.interrupts.vectors == 3
        assert function.config_read(spec.INTERRUPT_PIN, 1) == 0
        assert function.config_read(0x42, 2) == 2


def test_it_is_told_of_msix_and_bus_mastering_on_changes_only() -> None:
    with plug(Late) as plugged:
        function, seen = device_of(plugged), plugged.vdev.seen
        seen.clear()
        for value in (spec.MSIX_ENABLE, spec.MSIX_ENABLE | spec.MSIX_FUNCTION_MASK, 0, 0):
            function.config_write(0x42, 2, value)
        function.config_write(spec.COMMAND, 2, spec.COMMAND_MEMORY)
        assert seen == [("msix", True), ("msix", False), ("master", False)]


def test_direct_parts_reach_the_bus() -> None:
    with plug(Late) as plugged:
        assert plugged.device is not None
        base = plugged.device.bars[1][0]
        (mapped,) = [each for each in plugged.bus if each.base == base]
        assert mapped.handler.direct == (Late.part,)
