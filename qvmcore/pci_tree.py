"""Who is on PCI bus 0 (floor 8): for ``qvm show``, from the classes alone, with nothing opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qvmcore.options import format_size
from qvmcore.pci.host import HOST_BRIDGE_ADDRESS, HOST_BRIDGE_CLASS, HOST_BRIDGE_ID
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.vdev import BarWindow, PciVdev, interrupts_of
from qvmcore.types import MachineSpec, PciAddress, PciId
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.pci import MSIX_BAR, STRUCTURES, STRUCTURES_BAR, class_of, identity_of


@dataclass(frozen=True, slots=True)
class BarRow:
    """A BAR as its class declares it; ``size`` in bytes, ``bits`` 32 or 64."""

    number: int
    size: int
    bits: int
    prefetchable: bool = False

    def __str__(self) -> str:
        kind = " prefetchable" if self.prefetchable else ""
        return f"{self.number}: {format_size(self.size)}{' 64-bit' if self.bits == 64 else ''}{kind}"


@dataclass(frozen=True, slots=True)
class PciRow:
    """One function. ``identity`` and ``class_code`` are None when only the start decides them."""

    address: PciAddress
    identity: PciId | None
    class_code: int | None
    bars: tuple[BarRow, ...]
    owner: str


def pci_tree(spec: MachineSpec, classes: Mapping[str, type[Vdev]]) -> list[PciRow]:
    """The functions by address, the host bridge included; nothing for a machine without PCI."""
    if not spec.pci:
        return []
    rows = [PciRow(HOST_BRIDGE_ADDRESS, HOST_BRIDGE_ID, HOST_BRIDGE_CLASS, (), "host bridge")]
    for vdev in spec.vdevs:
        cls = classes[vdev.type]
        if vdev.pci is None:
            continue
        if issubclass(cls, VirtioVdev):
            rows.append(PciRow(vdev.pci, identity_of(cls), class_of(cls), _virtio_bars(cls), vdev.name))
        elif issubclass(cls, PciVdev):
            identity, code = getattr(cls, "pci_id", None), getattr(cls, "pci_class", None)
            rows.append(PciRow(vdev.pci, identity, code, _bars(cls), vdev.name))
    return sorted(rows, key=lambda row: row.address)


def _virtio_bars(cls: type[VirtioVdev]) -> tuple[BarRow, ...]:
    vectors = len(getattr(cls, "queue_sizes", ())) + 1
    return (
        BarRow(STRUCTURES_BAR, STRUCTURES.size, 64),
        BarRow(MSIX_BAR, PciInterrupts(vectors).bar_size, 32),
    )


def _bars(cls: type[PciVdev]) -> tuple[BarRow, ...]:
    rows, number = [], 0
    for window in cls.windows:
        wide = isinstance(window, BarWindow) and window.wide
        prefetchable = isinstance(window, BarWindow) and window.prefetchable
        rows.append(BarRow(number, window.size, 64 if wide else 32, prefetchable))
        number += 1 + wide
    interrupts = interrupts_of(cls)
    if interrupts.vectors:
        rows.append(BarRow(number, interrupts.bar_size, 32))
    return tuple(rows)
