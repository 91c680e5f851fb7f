"""The ACPI tables of a machine, each with its address (floor 8). Pure: nothing is opened or written.

All of them are in the 128 KiB below 1 MiB, where a PC keeps its firmware and where an operating
system looks for the root pointer by itself. The root pointer comes first, at 0xE0000; then a table
before those that point to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvmcore.acpi import AcpiTables, tables
from qvmcore.acpi.dsdt import PciBus, dsdt
from qvmcore.boards import Board, DescribedVdev
from qvmcore.engine import Controller
from qvmcore.errors import QvmError
from qvmcore.layout import pci_routes
from qvmcore.types import MachineSpec, Trigger

#: Where the tables go: from _START up to, not including, _END.
_START, _END = 0xE_0000, 0x10_0000
_ALIGNMENT, _FACS_ALIGNMENT = 16, 64

_POWER, _RTC = "acpi-pm", "PNP0B00"
_PIT_SOURCE, _PIT_LINE = 0, 2
_ISA_INTERRUPTS = 16


def build_acpi(spec: MachineSpec, vdevs: Sequence[DescribedVdev], board: Board) -> AcpiTables:
    """The tables of ``spec`` on ``board``, which has controllers of the kinds ``ioapic`` and ``apic``.

    The vdev acpi-pm must be among ``vdevs``. Raises QvmError when it is not, when its interrupt is
    not one of the I/O APIC, or when the tables do not fit; PluginError for a wrong ``acpi_hid``.
    """
    io_apic, local_apic = _controller(board, "ioapic"), _controller(board, "apic")
    power = _power(vdevs, io_apic.name)
    pci = PciBus(board.pci, pci_routes(board.pci, spec.vdevs)) if spec.pci and board.pci is not None else None
    level = {power.sci, *_level_isa(vdevs, io_apic.name)}
    overrides = [
        tables.Override(_PIT_SOURCE, _PIT_LINE, Trigger.EDGE),
        *(tables.Override(number, number, Trigger.LEVEL) for number in sorted(level)),
    ]
    image = _Image()
    facs = image.add(tables.facs(), _FACS_ALIGNMENT)
    main = image.add(dsdt(spec.cpus, vdevs, power, io_apic.name, pci))
    rtc = any(each.vdev.acpi_hid == _RTC for each in vdevs)
    listed = [
        image.add(tables.fadt(facs, main, power, rtc=rtc)),
        image.add(tables.madt(spec.cpus, local_apic.windows[0][0], io_apic.windows[0][0], overrides)),
    ]
    if pci is not None:
        listed.append(image.add(tables.mcfg(pci.host.ecam[0], 0)))
    return image.finish(image.add(tables.xsdt(listed)))


class _Image:
    """Hands out addresses, upwards from behind the root pointer."""

    def __init__(self) -> None:
        self._blobs: list[tuple[int, bytes]] = []
        self._free = _START + tables.RSDP_SIZE

    def add(self, blob: bytes, alignment: int = _ALIGNMENT) -> int:
        """The address of ``blob``."""
        address = -(-self._free // alignment) * alignment
        self._free = address + len(blob)
        self._blobs.append((address, blob))
        return address

    def finish(self, xsdt: int) -> AcpiTables:
        """The image, the root pointer included."""
        if self._free > _END:
            text = f"the ACPI tables of this machine take {self._free - _START} bytes, of {_END - _START}"
            raise QvmError(text, hint="give it fewer vdevs with an address, or fewer CPUs")
        return AcpiTables(_START, ((_START, tables.rsdp(xsdt)), *self._blobs))


def _controller(board: Board, kind: str) -> Controller:
    return next(each for each in board.controllers if each.kind == kind)


def _level_isa(vdevs: Sequence[DescribedVdev], io_apic: str) -> set[int]:
    """ISA interrupts that are levels. Without an override a guest takes them for edges.

    A vdev with a ``_CRS`` says it there too, but not to the early code that sets up the I/O APIC.
    """
    found = set()
    for each in vdevs:
        intr = each.spec.intr
        if intr is None or intr.controller != io_apic:
            continue
        if each.spec.pci is not None:
            found.add(intr.number)
        elif each.vdev.trigger is Trigger.LEVEL:
            found.update(range(intr.number, intr.number + each.vdev.irqs))
    return {number for number in found if number < _ISA_INTERRUPTS}


def _power(vdevs: Sequence[DescribedVdev], io_apic: str) -> tables.PowerPorts:
    for each in vdevs:
        spec = each.spec
        if spec.type != _POWER or spec.loc is None or spec.intr is None or spec.space != "io":
            continue
        if spec.intr.controller != io_apic:
            text = f"{spec.where}: intr: the power management interrupt cannot be {spec.intr}"
            raise QvmError(text, hint=f'write intr = "{io_apic}:9", or leave it out')
        size = sum(window.size for window in each.vdev.windows)
        return tables.PowerPorts(spec.loc, size, spec.intr.number)
    raise QvmError("the machine has no power management", hint=f"list a vdev of type {_POWER!r} with ports")
