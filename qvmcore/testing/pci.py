"""PCI in tests: looking at a bus through ECAM, and the contracts every PCI function keeps.

:class:`PciConformance` certifies a PciVdev, or a virtio vdev on PCI::

    class TestMine(PciConformance, TerminationConformance):
        vdev_class = Mine
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvmcore.bus import all_ones
from qvmcore.pci import spec
from qvmcore.testing.conformance import Kit
from qvmcore.testing.driver import Bus
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.pci_driver import PciDevice
from qvmcore.types import PciAddress

#: Header registers that never change: (offset, size).
_CONSTANT = (
    (spec.VENDOR_ID, 2), (spec.DEVICE_ID, 2), (spec.REVISION_ID, 1), (spec.CLASS_CODE, 3),
    (spec.HEADER_TYPE, 1), (spec.SUBSYSTEM_VENDOR_ID, 2), (spec.SUBSYSTEM_ID, 2),
    (spec.CAPABILITIES_POINTER, 1), (spec.INTERRUPT_PIN, 1), (0x28, 4), (0x30, 4), (0x35, 3),
)  # fmt: skip
_NOBODY = 0xFFFF


class EcamConfig:
    """The configuration space of one function, as a guest reaches it through ECAM at ``ecam``."""

    def __init__(self, bus: Bus, ecam: int, address: PciAddress) -> None:
        self._bus = bus
        self.base = ecam + (
            address.device << spec.ECAM_DEVICE_SHIFT | address.function << spec.ECAM_FUNCTION_SHIFT
        )

    def config_read(self, offset: int, size: int) -> int:
        """A load."""
        return self._bus.read(self.base + offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A store."""
        self._bus.write(self.base + offset, size, value)


def enumerate_bus(bus: Bus, ecam: int, aperture: int) -> dict[PciAddress, PciDevice]:
    """Every function an operating system would find on bus 0, with BARs sized and placed.

    Functions 1 to 7 are looked at only where function 0 says there are several (PCI 3.0, 6.2.1).
    """
    found: dict[PciAddress, PciDevice] = {}
    for number in range(spec.DEVICES):
        several = 1
        for function in range(spec.FUNCTIONS):
            address = PciAddress(number, function)
            device = PciDevice(EcamConfig(bus, ecam, address), aperture)
            if function >= several or device.read(spec.VENDOR_ID, 2) == _NOBODY:
                continue
            if device.read(spec.HEADER_TYPE, 1) & spec.HEADER_MULTIFUNCTION:
                several = spec.FUNCTIONS
            device.enumerate()
            found[address] = device
            aperture = max([aperture, *(base + size for base, size in device.bars.values())])
    return found


class PciConformance(Kit):
    """What holds for every PCI function (PCI 3.0, chapter 6)."""

    @pytest.fixture
    def on_pci(self, tmp_path: Path) -> Iterator[Plugged[Any]]:
        """The vdev on a PCI bus, enumerated; it must not have failed at the end."""
        options = self.make_options(tmp_path)
        with plug(self.vdev_class, options, base_dir=tmp_path, transport="pci") as device:
            yield device
            assert device.ctx.faults == []

    def test_6_2_1_it_identifies_itself(self, on_pci: Plugged[Any]) -> None:
        """A vendor, a class, and an ordinary header."""
        device = _device(on_pci)
        assert device.read(spec.VENDOR_ID, 2) not in (0, _NOBODY)
        assert device.read(spec.HEADER_TYPE, 1) & 0x7F == 0
        assert device.read(spec.CLASS_CODE, 3) != 0

    def test_6_2_constant_registers_stay(self, on_pci: Plugged[Any]) -> None:
        """Whatever is written wherever, in whatever size, these keep their values."""
        device = _device(on_pci)
        before = [device.read(*place) for place in _CONSTANT]
        for value in (0, (1 << 64) - 1):
            for size in (1, 2, 4):
                for offset in range(0, spec.HEADER_END, size):
                    device.write(offset, value & all_ones(size), size)
                assert [device.read(*place) for place in _CONSTANT] == before

    def test_6_7_the_capability_chain_ends(self, on_pci: Plugged[Any]) -> None:
        """Dword aligned, behind the header, no loop."""
        chain = _device(on_pci).capabilities()
        assert all(spec.HEADER_END <= at < spec.CONFIG_SIZE and at % 4 == 0 for at, _ in chain)
        assert len({at for at, _ in chain}) == len(chain)

    def test_6_2_5_1_bars_are_sized_and_moved(self, on_pci: Plugged[Any]) -> None:
        """Sizes are powers of two; a BAR decodes where it was put, and nowhere when disabled."""
        device = _device(on_pci)
        first = dict(device.bars)
        for number, (address, size) in first.items():
            assert size >= 16 and size & (size - 1) == 0, f"BAR {number} has {size} bytes"
            assert address % size == 0
        device.enumerate(anew=True)
        assert {number: size for number, (_, size) in device.bars.items()} == {
            number: size for number, (_, size) in first.items()
        }
        assert _decoded(on_pci) == {address for address, _ in device.bars.values()}
        device.write(spec.COMMAND, 0, 2)
        assert _decoded(on_pci) == set()

    def test_6_8_2_msix_table_and_pending_bits_are_inside_their_bars(self, on_pci: Plugged[Any]) -> None:
        """And every vector is masked at first (6.8.2.9)."""
        device = _device(on_pci)
        at = next((at for at, kind in device.capabilities() if kind == spec.CAP_MSIX), None)
        if at is None:
            pytest.skip(f"{self.vdev_class.__name__} has no MSI-X")
        vectors = (device.read(at + 2, 2) & 0x7FF) + 1
        lengths = (vectors * spec.MSIX_ENTRY_SIZE, (vectors + 63) // 64 * 8)
        for register, length in zip((at + 4, at + 8), lengths, strict=True):
            number, offset = device.read(register) & 7, device.read(register) & ~7
            assert offset + length <= device.bars[number][1]
        base = device.bars[device.read(at + 4) & 7][0] + (device.read(at + 4) & ~7)
        for vector in range(vectors):
            assert on_pci.bus.read(base + spec.MSIX_ENTRY_SIZE * vector + 12, 4) & 1

    def test_any_configuration_access_is_harmless(self, on_pci: Plugged[Any]) -> None:
        """Any offset of the 4096 bytes, any size, also unaligned and over the end."""
        device = _device(on_pci)
        edges = (*range(spec.CONFIG_SIZE), spec.EXTENDED_SIZE - 8, spec.EXTENDED_SIZE - 1)
        for value in (0, 0x5A5A5A5A5A5A5A5A, (1 << 64) - 1):
            for offset in edges:
                for size in (1, 2, 4, 8):
                    device.write(offset, value & all_ones(size), size)
                    assert 0 <= device.read(offset, size) <= all_ones(size)
        on_pci.settle()


def _device(plugged: Plugged[Any]) -> PciDevice:
    assert plugged.device is not None, "the vdev is not a PCI function"
    return plugged.device


def _decoded(plugged: Plugged[Any]) -> set[int]:
    return {mapped.base for mapped in plugged.bus}
