"""The board ``x86_64-pc`` (floor 8): 64-bit x86, I/O APIC and local APICs, described by ACPI.

Memory::

    0x00000000  RAM, up to 3 GiB of it; 0xa0000 to 0xfffff is the tables' (see qvmcore.acpi.image)
    0xc0000000  room for vdevs with an address of their own
    0xfec00000  I/O APIC                0xfee00000  local APICs, MSI
    0xfffbc000  to 0xfffbffff: KVM's own pages
    0x100000000 the rest of RAM

and, when a vdev is on PCI::

    0xd0000000  BARs, 32-bit            0xf0000000  ECAM of bus 0
    0x4000000000  BARs, 64-bit          I/O ports 0xcf8 to 0xcff  configuration
    ioapic:20-23  INTA to INTD, swizzled by device number

I/O ports and lines::

    0x20, 0xa0, 0x4d0  i8259            0x40, 0x61  i8254, ioapic:2
    0x3f8  uart0  ser8250  ioapic:4     0x70  rtc0  mc146818  ioapic:8
    0x600  pm0    acpi-pm  ioapic:9     (power button, power-off, reset)

``ioapic:N`` is input N of the I/O APIC, which is the global interrupt N of ACPI. ``apic:N`` is vector
N of CPU 0, for guests without tables: ACPI has no words for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvmcore.acpi import AcpiTables
from qvmcore.acpi.image import build_acpi
from qvmcore.boards import DescribedVdev, ImplicitVdev, PciHost, Placement
from qvmcore.engine import Controller, CpuEntry, MsiFrame
from qvmcore.errors import QvmError
from qvmcore.load.x86 import load_pc
from qvmcore.memory import GuestMemory
from qvmcore.types import IntrSpec, MachineSpec, MemorySpec

_LOW_RAM = 0xC000_0000
_HIGH_RAM = 0x1_0000_0000
_APIC, _APIC_SIZE = 0xFEE0_0000, 0x10_0000


class X86Pc:
    """See the module; the board has no state."""

    name = "x86_64-pc"
    arch = "x86_64"
    summary = "64-bit x86, I/O APIC, 8250 console, ACPI"
    port_space = 0x1_0000
    address_limit = 1 << 39
    max_cpus = 255  # identifiers of local APICs have eight bits, and 255 is all of them
    controllers = (
        # Input 0 has no line here, and on 2 is the timer.
        Controller(kind="ioapic", name="ioapic", windows=((0xFEC0_0000, 0x1000),), lines=range(3, 24)),
        Controller(kind="apic", name="apic", windows=((_APIC, _APIC_SIZE),), lines=range(32, 256)),
        Controller("i8259", "pic", (), range(0), ports=((0x20, 2), (0xA0, 2), (0x4D0, 2))),
        Controller("i8254", "pit", (), range(0), ports=((0x40, 4), (0x61, 1))),
    )
    implicit = (
        ImplicitVdev("ser8250", "uart0", 0x3F8, IntrSpec("ioapic", 4), {"hostdev": "stdio"}, space="io"),
        ImplicitVdev("mc146818", "rtc0", 0x70, IntrSpec("ioapic", 8), space="io"),
        ImplicitVdev("acpi-pm", "pm0", 0x600, IntrSpec("ioapic", 9), space="io"),
    )
    pci = PciHost(
        ecam=(0xF000_0000, 0x10_0000),
        apertures=((0xD000_0000, 0x2000_0000), (0x40_0000_0000, 0x40_0000_0000)),
        intx=(
            IntrSpec("ioapic", 20),
            IntrSpec("ioapic", 21),
            IntrSpec("ioapic", 22),
            IntrSpec("ioapic", 23),
        ),
        msi=MsiFrame("apic", "apic", _APIC, _APIC_SIZE, range(0)),
        config_ports=0xCF8,
    )
    vdev_space = range(_LOW_RAM, 0xD000_0000, 0x1000)
    vdev_lines = range(5, 20)

    def ram(self, size: int) -> tuple[MemorySpec, ...]:
        """What does not fit below the devices goes above 4 GiB."""
        if size <= _LOW_RAM:
            return (MemorySpec(0, size),)
        return (MemorySpec(0, _LOW_RAM), MemorySpec(_HIGH_RAM, size - _LOW_RAM))

    def load(self, spec: MachineSpec, vdevs: Sequence[DescribedVdev], memory: GuestMemory) -> CpuEntry:
        """By the boot protocol of the kernel; see :mod:`qvmcore.load.x86`."""
        return load_pc(spec.load, memory, self.build_acpi(spec, vdevs))

    def build_acpi(self, spec: MachineSpec, vdevs: Sequence[DescribedVdev]) -> AcpiTables:
        """The tables; see :mod:`qvmcore.acpi.image`."""
        return build_acpi(spec, vdevs, self)

    def build_fdt(
        self, spec: MachineSpec, vdevs: Sequence[DescribedVdev], placement: Placement | None = None
    ) -> bytes:
        """There is none: raises QvmError."""
        raise QvmError(
            f"{self.name} is not described by a device tree", hint="qvm acpi writes its ACPI tables"
        )
