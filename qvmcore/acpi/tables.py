"""The ACPI tables of fixed form (floor 8): RSDP, XSDT, FADT, FACS, MADT and MCFG (ACPI 6.3, 5.2).

Every function gives one table with its checksum. Addresses are guest-physical, sizes bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from qvmcore.types import Trigger

#: Signature, length, revision, checksum, OEM and OEM table ID, OEM revision, creator and revision.
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
HEADER_SIZE = _HEADER.size
_LENGTH, _CHECKSUM = 4, 9
_OEM, _OEM_TABLE, _CREATOR = b"QVM   ", b"QVM-X86 ", b"QVM "

RSDP_SIZE = 36
FACS_SIZE = 64
#: The revisions of ACPI 6.3; 2 makes the integers of a DSDT 64 bits wide.
_REVISIONS = {b"XSDT": 1, b"FACP": 6, b"APIC": 5, b"MCFG": 1, b"DSDT": 2}
_FADT_MINOR = 3

#: FADT flags (table 5-34): caches are flushed by WBINVD, every CPU has C1, no sleep button, no RTC
#: wake-up, a timer of 32 bits, the reset register is there. A clear bit 4 is the power button
#: among the fixed registers, a clear bit 20 that the registers below are there at all.
_FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
#: IAPC_BOOT_ARCH: devices as on an ISA bus; no 8042 (bit 1 clear); do not look for VGA. And: no RTC.
_LEGACY_DEVICES, _NO_VGA, _NO_RTC = 1 << 0, 1 << 2, 1 << 5
_SERVER = 4
#: Latencies in us that say: there is no C2 (over 100) and no C3 (over 1000).
_NO_C2, _NO_C3 = 101, 1001

#: Offsets of the registers of acpi-pm in its window, and what resets the machine.
_PM1_EVENT, _PM1_CONTROL, _PM_TIMER, _RESET = 0, 4, 8, 12
_RESET_VALUE = 1
#: SLP_TYP of S5, the only sleeping state there is.
S5_TYPE = 5

#: MADT: flags of an interrupt source. Active high; edge or level.
_HIGH = 0b01
_TRIGGERS = {Trigger.EDGE: 0b01 << 2, Trigger.LEVEL: 0b11 << 2}
#: The 8259s are there too.
_PCAT_COMPAT = 1


@dataclass(frozen=True, slots=True)
class PowerPorts:
    """Where acpi-pm is: its first port, how many there are, and the global interrupt of the SCI."""

    base: int
    size: int
    sci: int


@dataclass(frozen=True, slots=True)
class Override:
    """An ISA interrupt that is another global interrupt, or not edge-triggered."""

    source: int
    line: int
    trigger: Trigger


def table(signature: bytes, body: bytes) -> bytes:
    """A table with its header and checksum: all its bytes add up to 0 modulo 256."""
    size = HEADER_SIZE + len(body)
    head = _HEADER.pack(signature, size, _REVISIONS[signature], 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    return _with_checksum(bytearray(head + body), _CHECKSUM)


def rsdp(xsdt: int) -> bytes:
    """The root pointer, revision 2 (5.2.5.3). It has no RSDT, which 32-bit systems before 2.0 read."""
    raw = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, RSDP_SIZE, xsdt, 0))
    first = 20  # the part that ACPI 1.0 knew has a checksum of its own
    raw[:first] = _with_checksum(raw[:first], 8)
    return _with_checksum(raw, 32)


def xsdt(addresses: Sequence[int]) -> bytes:
    """The list of the other tables."""
    return table(b"XSDT", struct.pack(f"<{len(addresses)}Q", *addresses))


def facs() -> bytes:
    """The firmware control structure, version 2 (5.2.10); it has no checksum. Aligned to 64 bytes."""
    return struct.pack("<4sI24xB31x", b"FACS", FACS_SIZE, 2)


def fadt(facs_address: int, dsdt_address: int, power: PowerPorts, *, rtc: bool) -> bytes:
    """Power management (5.2.9). ``rtc``: the machine has a clock at ports 0x70 and 0x71.

    The machine is always in ACPI mode: without an SMI command port there is nothing to switch.
    """
    event, control = power.base + _PM1_EVENT, power.base + _PM1_CONTROL
    timer = power.base + _PM_TIMER
    boot = _LEGACY_DEVICES | _NO_VGA | (0 if rtc else _NO_RTC)
    body = struct.pack("<IIxBH8x", facs_address, dsdt_address, _SERVER, power.sci)
    body += struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0)
    body += struct.pack("<BBBB4x", 4, 2, 0, 4)  # lengths of the blocks above
    body += struct.pack("<HH9xHxI", _NO_C2, _NO_C3, boot, _FADT_FLAGS)
    body += _io_register(power.base + _RESET, 1) + struct.pack("<BHB", _RESET_VALUE, 0, _FADT_MINOR)
    # FACS is named once, above; the DSDT in both widths.
    body += struct.pack("<QQ", 0, dsdt_address)
    absent = bytes(12)
    body += _io_register(event, 4, access=2) + absent
    body += _io_register(control, 2) + absent * 2
    body += _io_register(timer, 4) + absent * 4
    return table(b"FACP", body + b"qvm".ljust(8, b"\0"))


def madt(cpus: int, local_apic: int, io_apic: int, overrides: Sequence[Override]) -> bytes:
    """The interrupt controllers (5.2.12): CPU n has the local APIC n; the I/O APIC starts at line 0."""
    body = struct.pack("<II", local_apic, _PCAT_COMPAT)
    for index in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, index, index, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, io_apic, 0)
    for each in overrides:
        body += struct.pack("<BBBBIH", 2, 10, 0, each.source, each.line, _HIGH | _TRIGGERS[each.trigger])
    # LINT1 of every CPU is the NMI, as the board wires nothing else to it.
    return table(b"APIC", body + struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))


def mcfg(ecam: int, last_bus: int) -> bytes:
    """Where the configuration window of PCI segment 0, buses 0 to ``last_bus``, is (PCI firmware 4.1.2)."""
    return table(b"MCFG", struct.pack("<8xQHBB4x", ecam, 0, 0, last_bus))


def _io_register(port: int, size: int, *, access: int | None = None) -> bytes:
    """A generic address: a register of ``size`` bytes in the I/O space, read ``access`` at a time."""
    code = {1: 1, 2: 2, 4: 3}[size if access is None else access]
    return struct.pack("<BBBBQ", 1, size * 8, 0, code, port)


def _with_checksum(raw: bytearray, offset: int) -> bytes:
    raw[offset] = 0
    raw[offset] = -sum(raw) & 0xFF
    return bytes(raw)
