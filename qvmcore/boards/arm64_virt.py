"""The board ``arm64-virt`` (floor 8): 64-bit Arm, GICv2, PSCI, described by a device tree.

::

    0x08000000  GICv2 distributor   0x09000000  uart0  pl011  gic:33
    0x08010000  GICv2 CPU interface 0x09030000  gpio0  pl061  gic:39  (power button)
    0x40000000  RAM

and, when a vdev is on PCI::

    0x08020000  GICv2m MSI frame, SPI 80-207        0x10000000  ECAM of bus 0
    0x20000000  BARs, 32-bit, to 0x3effffff         0x8000000000  BARs, 64-bit
    gic:35-38   INTA to INTD, swizzled by device number

The addresses are those of the widely used "virt" machine, so kernels with ``earlycon`` set for it
print here too. Bindings: Documentation/devicetree/bindings of Linux; interrupts of a GIC are
three cells (0 = SPI / 1 = PPI, number, trigger), INTID 32 is SPI 0 and INTID 16 is PPI 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from qvmcore.acpi import AcpiTables
from qvmcore.boards import DescribedVdev, ImplicitVdev, PciHost, Placement
from qvmcore.boards.arm64_pci import describe_pci
from qvmcore.engine import Controller, CpuEntry, MsiFrame
from qvmcore.errors import QvmError
from qvmcore.fdt import DeviceTree, Node
from qvmcore.layout import place_windows
from qvmcore.load.arm64 import load_arm64
from qvmcore.memory import GuestMemory
from qvmcore.types import IntrSpec, MachineSpec, MemorySpec, Trigger
from qvmcore.vdev import Vdev

_SPI, _PPI = 0, 1
_EDGE_RISING, _LEVEL_HIGH, _LEVEL_LOW = 1, 4, 8
_FIRST_SPI = 32
_RAM_BASE = 0x4000_0000

#: PPIs of the architected timer: secure, non-secure, virtual, hypervisor (INTID minus 16).
_TIMER_PPIS = (13, 14, 11, 10)

#: Generic node names of the devicetree specification, by compatible string.
_NODE_NAMES = {"arm,pl011": "serial", "arm,pl061": "gpio", "arm,pl031": "rtc", "virtio,mmio": "virtio"}

#: Bytes of randomness handed to the guest, so that its generator is seeded at once.
_RNG_SEED_BYTES = 64


class Arm64Virt:
    """See the module; the board has no state."""

    name = "arm64-virt"
    arch = "aarch64"
    summary = "64-bit Arm, GICv2, PL011 console, device tree"
    port_space = 0
    address_limit = 1 << 40
    max_cpus = 8  # a GICv2 has eight CPU interfaces
    controllers = (
        Controller(
            kind="gicv2",
            name="gic",
            windows=((0x0800_0000, 0x1_0000), (0x0801_0000, 0x1_0000)),
            lines=range(_FIRST_SPI, 288),
        ),
    )
    implicit = (
        ImplicitVdev("pl011", "uart0", 0x0900_0000, IntrSpec("gic", 33), {"hostdev": "stdio"}),
        ImplicitVdev("pl061", "gpio0", 0x0903_0000, IntrSpec("gic", 39)),
    )
    pci = PciHost(
        ecam=(0x1000_0000, 0x10_0000),
        apertures=((0x2000_0000, 0x1F00_0000), (0x80_0000_0000, 0x80_0000_0000)),
        intx=(IntrSpec("gic", 35), IntrSpec("gic", 36), IntrSpec("gic", 37), IntrSpec("gic", 38)),
        msi=MsiFrame("gicv2m", "gic", 0x0802_0000, 0x1000, range(112, 240)),
    )
    vdev_space = range(0x1C0D_0000, 0x2000_0000, 0x1_0000)
    vdev_lines = range(41, 112)

    def ram(self, size: int) -> tuple[MemorySpec, ...]:
        """One range."""
        return (MemorySpec(_RAM_BASE, size),)

    def load(self, spec: MachineSpec, vdevs: Sequence[DescribedVdev], memory: GuestMemory) -> CpuEntry:
        """By the booting protocol of arm64; see :mod:`qvmcore.load`."""
        return load_arm64(spec.load, memory, lambda placed: self.build_fdt(spec, vdevs, placed))

    def build_acpi(self, spec: MachineSpec, vdevs: Sequence[DescribedVdev]) -> AcpiTables:
        """There are none: raises QvmError."""
        raise QvmError(f"{self.name} is not described by ACPI", hint="qvm fdt writes its device tree")

    def build_fdt(
        self, spec: MachineSpec, vdevs: Sequence[DescribedVdev], placement: Placement | None = None
    ) -> bytes:
        """The device tree blob; see :class:`qvmcore.boards.Board`."""
        tree = DeviceTree()
        root = tree.root
        root.set_string("model", "qvm,arm64-virt")
        root.set_string("compatible", "linux,dummy-virt")
        root.set_cells("#address-cells", 2)
        root.set_cells("#size-cells", 2)
        root.set_flag("dma-coherent")
        chosen, aliases = root.child("chosen"), root.child("aliases")
        _describe_cpus(root, spec.cpus)
        gic = _describe_gic(root, self.controllers[0])
        root.set_cells("interrupt-parent", gic.phandle())
        _describe_timer(root)
        _describe_clock(root)
        for memory in spec.memory:
            if not memory.rom:
                node = root.child(f"memory@{memory.start:x}")
                node.set_string("device_type", "memory")
                node.set_cells64("reg", memory.start, memory.size)
        if spec.pci:
            describe_pci(root, gic, self.pci, spec.vdevs)
        # Every node exists before any vdev describes itself, so one may refer to another.
        # A PCI function needs no node: the guest finds it by itself.
        nodes = [
            (each, _announce(root, each))
            for each in vdevs
            if each.vdev.fdt_compatible and each.spec.pci is None
        ]
        for each, node in nodes:
            each.vdev.describe_fdt(node)
            if node.has("interrupt-controller") and not node.has("#address-cells"):
                node.set_cells("#address-cells", 0)
        serial = [node for each, node in nodes if "arm,pl011" in each.vdev.fdt_compatible]
        for index, node in enumerate(serial):
            aliases.set_string(f"serial{index}", node.path)
        _describe_chosen(chosen, spec, serial, placement)
        return tree.to_dtb()


def _describe_cpus(root: Node, count: int) -> None:
    psci = root.child("psci")
    psci.set_string("compatible", "arm,psci-1.0", "arm,psci-0.2")
    psci.set_string("method", "hvc")
    cpus = root.child("cpus")
    cpus.set_cells("#address-cells", 1)
    cpus.set_cells("#size-cells", 0)
    for index in range(count):
        cpu = cpus.child(f"cpu@{index:x}")
        cpu.set_string("device_type", "cpu")
        cpu.set_string("compatible", "arm,cortex-a72")
        cpu.set_cells("reg", index)
        cpu.set_string("enable-method", "psci")


def _describe_gic(root: Node, gic: Controller) -> Node:
    node = root.child(f"interrupt-controller@{gic.windows[0][0]:x}")
    node.set_string("compatible", "arm,cortex-a15-gic")
    node.set_flag("interrupt-controller")
    node.set_cells("#interrupt-cells", 3)
    node.set_cells("#address-cells", 0)
    node.set_cells64("reg", *(number for window in gic.windows for number in window))
    return node


def _describe_timer(root: Node) -> None:
    node = root.child("timer")
    node.set_string("compatible", "arm,armv8-timer")
    node.set_flag("always-on")
    # Bits 8 to 15 of a PPI's flags name the CPUs it is wired to; the timer is on all of them.
    flags = 0xFF << 8 | _LEVEL_LOW
    node.set_cells("interrupts", *(cell for ppi in _TIMER_PPIS for cell in (_PPI, ppi, flags)))


def _describe_clock(root: Node) -> None:
    node = root.child("apb-pclk")
    node.set_string("compatible", "fixed-clock")
    node.set_cells("#clock-cells", 0)
    node.set_cells("clock-frequency", 24_000_000)
    node.set_string("clock-output-names", "clk24mhz")
    node.phandle()


def _announce(root: Node, described: DescribedVdev) -> Node:
    """The node of a vdev with ``compatible``, ``reg`` and ``interrupts``."""
    spec, vdev = described.spec, described.vdev
    unit = f"@{spec.loc:x}" if spec.loc is not None else f"-{spec.name}"
    node = root.child(_node_name(vdev) + unit)
    node.set_string("compatible", *vdev.fdt_compatible)
    if spec.loc is not None:
        windows = place_windows(spec.loc, vdev.windows)
        node.set_cells64("reg", *(number for window in windows for number in window))
    if spec.intr is not None and vdev.irqs:
        flags = _EDGE_RISING if vdev.trigger is Trigger.EDGE else _LEVEL_HIGH
        first = spec.intr.number - _FIRST_SPI
        cells = (cell for line in range(vdev.irqs) for cell in (_SPI, first + line, flags))
        node.set_cells("interrupts", *cells)
    if "virtio,mmio" in vdev.fdt_compatible:
        # The vdev and the vCPUs share the host's caches.
        node.set_flag("dma-coherent")
    return node


def _node_name(vdev: Vdev) -> str:
    for compatible in vdev.fdt_compatible:
        if compatible in _NODE_NAMES:
            return _NODE_NAMES[compatible]
    return vdev.vdev_type


def _describe_chosen(
    chosen: Node, spec: MachineSpec, serial: Sequence[Node], placement: Placement | None
) -> None:
    if spec.load.cmdline:
        chosen.set_string("bootargs", spec.load.cmdline)
    if serial:
        chosen.set_string("stdout-path", serial[0].path)
    if placement is not None and placement.initrd is not None:
        start, end = placement.initrd
        chosen.set_cells64("linux,initrd-start", start)
        chosen.set_cells64("linux,initrd-end", end)
    chosen.set_bytes("kaslr-seed", os.urandom(8))
    chosen.set_bytes("rng-seed", os.urandom(_RNG_SEED_BYTES))
