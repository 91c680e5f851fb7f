r"""The DSDT (floor 8): CPUs, vdevs with an ``acpi_hid``, the PCI host bridge, and how to power off.

Linux is the reader that decides the details. It trusts the configuration window of the MCFG table
only when a PNP0C02 device reserves it. A ``_CCA`` is not there: devices of an x86 machine share the
caches of the CPUs, and it is read on Arm only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qvmcore.acpi import aml, resources
from qvmcore.acpi.tables import S5_TYPE, PowerPorts, table
from qvmcore.boards import DescribedVdev, PciHost
from qvmcore.errors import PluginError, QvmError
from qvmcore.layout import place_windows
from qvmcore.types import IntrSpec

#: Three hexadecimal digits behind the V of a vdev's name.
_MAX_VDEVS = 1 << 12

#: "PCI host bridge": what the operating system calls _OSC with (PCI firmware 4.5).
_PCI_OSC = "33db4d5b-1ff7-401c-9657-7441c03dd766"
#: Hot-plug, SHPC, PME, AER, capability structures: nobody but the guest would look after them.
_PCI_GRANTED = 0x1F
_WRONG_UUID, _WRONG_REVISION, _NOT_ALL_GRANTED = 1 << 2, 1 << 3, 1 << 4
_PINS = 4


@dataclass(frozen=True, slots=True)
class PciBus:
    """PCI bus 0 and the interrupt line of each device number that is taken."""

    host: PciHost
    routes: Mapping[int, IntrSpec]


def dsdt(
    cpus: int, vdevs: Sequence[DescribedVdev], power: PowerPorts, controller: str, pci: PciBus | None
) -> bytes:
    """The table. ``controller`` names the one whose interrupt numbers are the global ones of ACPI.

    Raises PluginError for a vdev with an ID that is none, QvmError for too many vdevs.
    """
    # SLP_TYP for PM1a and PM1b, which there is not, and two reserved numbers (7.4.2).
    s5 = aml.package([aml.integer(S5_TYPE), aml.ZERO, aml.ZERO, aml.ZERO])
    devices = [*_processors(cpus), _motherboard(power, pci), *_vdevs(vdevs, controller)]
    if pci is not None:
        devices.append(_host_bridge(pci, controller))
    return table(b"DSDT", aml.name("\\_S5", s5) + aml.scope("\\_SB", *devices))


def _processors(count: int) -> list[bytes]:
    """_UID is that of the local APIC in the MADT."""
    return [
        aml.device(f"C{index:03X}", _hid("ACPI0007"), aml.name("_UID", aml.integer(index)))
        for index in range(count)
    ]


def _motherboard(power: PowerPorts, pci: PciBus | None) -> bytes:
    """Ranges that belong to no other device, so that the guest gives them to nobody."""
    ranges = [resources.ports(power.base, power.size)]
    if pci is not None:
        ranges.append(resources.memory(*pci.host.ecam))
    return aml.device("MBRD", _hid("PNP0C02"), aml.name("_UID", aml.ZERO), _crs(ranges))


def _vdevs(vdevs: Sequence[DescribedVdev], controller: str) -> list[bytes]:
    """In the order given; those of one ID are numbered from 0 in _UID. PCI functions are found."""
    announced = [each for each in vdevs if each.vdev.acpi_hid and each.spec.pci is None]
    if len(announced) > _MAX_VDEVS:
        raise QvmError(f"{len(announced)} vdevs are more than ACPI tables name ({_MAX_VDEVS})")
    seen: Counter[str] = Counter()
    devices = []
    for index, each in enumerate(announced):
        hid = each.vdev.acpi_hid
        try:
            identity = _hid(hid)
        except ValueError as error:
            raise PluginError(
                f"{each.spec.where}: acpi_hid: {error}", hint="report it to its author"
            ) from None
        uid = aml.name("_UID", aml.integer(seen[hid]))
        seen[hid] += 1
        devices.append(aml.device(f"V{index:03X}", identity, uid, _crs(_resources(each, controller))))
    return devices


def _resources(each: DescribedVdev, controller: str) -> list[bytes]:
    """Each window, and the lines. A line that is no input of ``controller`` cannot be told."""
    spec, vdev = each.spec, each.vdev
    place = resources.ports if spec.space == "io" else resources.memory
    found = []
    if spec.loc is not None:
        found += [place(base, size) for base, size in place_windows(spec.loc, vdev.windows)]
    if spec.intr is not None and vdev.irqs and spec.intr.controller == controller:
        lines = range(spec.intr.number, spec.intr.number + vdev.irqs)
        found.append(resources.interrupts(lines, vdev.trigger))
    return found


def _host_bridge(pci: PciBus, controller: str) -> bytes:
    windows = [resources.bus_window(0, 0)]
    if pci.host.config_ports is not None:
        windows.append(resources.ports(pci.host.config_ports, 8))
    windows += [resources.memory_window(*aperture) for aperture in pci.host.apertures]
    return aml.device(
        "PCI0",
        _hid("PNP0A08"),  # PCI Express, for the configuration window; PNP0A03 is plain PCI
        aml.name("_CID", aml.hardware_id("PNP0A03")),
        aml.name("_UID", aml.ZERO),
        aml.name("_SEG", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        _crs(windows),
        *_routes(pci, controller),
        _osc(),
    )


def _routes(pci: PciBus, controller: str) -> list[bytes]:
    """_PRT (6.2.13), which must not be empty.

    Pin A of a device number is its line; the other pins, which no vdev drives, follow the swizzle.
    """
    entries = []
    for device, intr in sorted(pci.routes.items()):
        if intr.controller != controller:
            continue
        for pin in range(_PINS):
            line = pci.host.intx[(device + pin) % _PINS] if pin else intr
            # Any function of the device; no link device, so the number is a global interrupt.
            entry = (device << 16 | 0xFFFF, pin, 0, line.number)
            entries.append(aml.package(aml.integer(number) for number in entry))
    return [aml.name("_PRT", aml.package(entries))] if entries else []


def _osc() -> bytes:
    """_OSC (6.2.11): the guest may have what it asks for, but for what is not in _PCI_GRANTED."""
    status, control = aml.path("CDW1"), aml.path("CDW3")
    granted = aml.LOCAL0

    def flag(bit: int) -> bytes:
        return aml.or_(status, aml.integer(bit), status)

    return aml.method(
        "_OSC",
        4,
        aml.create_dword_field(aml.ARG3, 0, "CDW1"),
        aml.if_(
            aml.equal(aml.ARG0, aml.uuid(_PCI_OSC)),
            aml.create_dword_field(aml.ARG3, 8, "CDW3"),
            aml.if_(aml.not_(aml.equal(aml.ARG1, aml.ONE)), flag(_WRONG_REVISION)),
            aml.and_(control, aml.integer(_PCI_GRANTED), granted),
            aml.if_(aml.not_(aml.equal(control, granted)), flag(_NOT_ALL_GRANTED)),
            aml.store(granted, control),
        ),
        aml.else_(flag(_WRONG_UUID)),
        aml.return_(aml.ARG3),
    )


def _hid(text: str) -> bytes:
    return aml.name("_HID", aml.hardware_id(text))


def _crs(descriptors: Sequence[bytes]) -> bytes:
    return aml.name("_CRS", resources.template(descriptors))
