"""The PCI host of arm64-virt in the device tree (floor 8).

Bindings of Linux: ``pci/host-generic-pci.yaml``, ``interrupt-controller/arm,gic.yaml`` (v2m frames).
A PCI address is three cells; the first holds the space (2 = 32-bit memory, 3 = 64-bit memory) or, in
the interrupt map, the device number at bit 11.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvmcore.boards import PciHost
from qvmcore.fdt import Node
from qvmcore.layout import pci_routes
from qvmcore.types import VdevSpec

_MEMORY_32, _MEMORY_64 = 0x0200_0000, 0x0300_0000
_DEVICE_SHIFT = 11
_PIN_A = 1
_SPI, _LEVEL_HIGH, _FIRST_SPI = 0, 4, 32


def describe_pci(root: Node, gic: Node, pci: PciHost, vdevs: Sequence[VdevSpec]) -> None:
    """The host bridge node, and the MSI frame below the interrupt controller."""
    base, size = pci.ecam
    node = root.child(f"pcie@{base:x}")
    node.set_string("compatible", "pci-host-ecam-generic")
    node.set_string("device_type", "pci")
    node.set_cells("#address-cells", 3)
    node.set_cells("#size-cells", 2)
    node.set_cells64("reg", base, size)
    node.set_cells("bus-range", 0, 0)
    node.set_flag("dma-coherent")
    ranges: list[int] = []
    for space, (start, length) in zip((_MEMORY_32, _MEMORY_64), pci.apertures, strict=True):
        ranges += [space, *_two(start), *_two(start), *_two(length)]
    node.set_cells("ranges", *ranges)
    node.set_cells("msi-parent", _msi_frame(gic, pci).phandle())
    routes: list[int] = []
    for device, intr in sorted(pci_routes(pci, vdevs).items()):
        # The controller has two address cells, because of its child; they say nothing here.
        parent = [gic.phandle(), 0, 0, _SPI, intr.number - _FIRST_SPI, _LEVEL_HIGH]
        routes += [device << _DEVICE_SHIFT, 0, 0, _PIN_A, *parent]
    if routes:
        node.set_cells("#interrupt-cells", 1)
        node.set_cells("interrupt-map-mask", 31 << _DEVICE_SHIFT, 0, 0, 7)
        node.set_cells("interrupt-map", *routes)


def _msi_frame(gic: Node, pci: PciHost) -> Node:
    """The frame is a child of the controller, so the controller becomes a bus."""
    gic.set_cells("#address-cells", 2)
    gic.set_cells("#size-cells", 2)
    gic.set_flag("ranges")
    frame = gic.child(f"v2m@{pci.msi.base:x}")
    frame.set_string("compatible", "arm,gic-v2m-frame")
    frame.set_flag("msi-controller")
    frame.set_cells64("reg", pci.msi.base, pci.msi.size)
    return frame


def _two(value: int) -> tuple[int, int]:
    return value >> 32, value & 0xFFFFFFFF
