"""The tables of fixed form: every field that a guest acts on, read back by iasl or at its offset."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvmcore.acpi import tables
from qvmcore.errors import QvmError
from qvmcore.types import IntrSpec, Trigger, VdevSpec
from tests.unit.acpifiles import (
    ACPICA,
    DIRECT,
    FIXED,
    PCI,
    PM,
    RTC,
    UART,
    described,
    disassemble,
    function,
    image_of,
    kind,
    line,
    recompile,
    tables_of,
)

HEADER = 36


def length_of(blob: bytes) -> int:
    return int(struct.unpack_from("<I", blob, 4)[0])


def fields(text: str) -> dict[str, str]:
    """The named fields of a disassembled table; the first of several with one name counts."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"^(?:\[[^\]]*\])?[ ]*([^\n]+?) : (.*)$", text, re.MULTILINE):
        found.setdefault(name, value.strip())
    return found


def subtables(madt: bytes) -> list[bytes]:
    """The controller structures behind the fixed part; their lengths end exactly at the table's end."""
    found, at = [], HEADER + 8
    while at < len(madt):
        assert madt[at + 1] >= 2
        found.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    return found


def check_image(named: dict[str, tuple[int, bytes]]) -> None:
    """What holds for every machine: sums, lengths, places, and who points to whom."""
    ranges = sorted((at, at + len(blob)) for at, blob in named.values())
    assert ranges[0][0] == 0xE0000
    assert ranges[-1][1] <= 0x100000
    assert all(one[1] <= other[0] for one, other in pairwise(ranges))
    assert all(at % 16 == 0 for at, _ in named.values())
    assert named["facs"][0] % 64 == 0
    for name, (_, blob) in named.items():
        if name not in ("rsdp", "facs"):
            assert sum(blob) & 0xFF == 0, name
        if name != "rsdp":
            assert length_of(blob) == len(blob), name
    rsdp = named["rsdp"][1]
    assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
    assert struct.unpack_from("<Q", rsdp, 24)[0] == named["xsdt"][0]
    entries = [each for (each,) in struct.iter_unpack("<Q", named["xsdt"][1][HEADER:])]
    assert entries == [named[name][0] for name in ("facp", "apic", "mcfg") if name in named]
    facp = named["facp"][1]
    assert struct.unpack_from("<II", facp, 36) == (named["facs"][0], named["dsdt"][0])
    assert struct.unpack_from("<QQ", facp, 132) == (0, named["dsdt"][0])


@pytest.mark.parametrize("pci", [False, True], ids=["no-pci", "pci"])
def test_sums_lengths_places_and_pointers(pci: bool) -> None:
    named = tables_of((*FIXED, *DIRECT, *(PCI if pci else ())), cpus=3, pci=pci)
    assert set(named) == {"rsdp", "facs", "dsdt", "facp", "apic", "xsdt"} | ({"mcfg"} if pci else set())
    check_image(named)


@settings(max_examples=60, deadline=None)
@given(
    cpus=st.integers(1, 255),
    places=st.lists(
        st.tuples(st.integers(0, 1 << 39), st.integers(1, 1 << 30), st.integers(0, 4)), max_size=80
    ),
    pci=st.booleans(),
)
def test_tables_never_touch_and_always_add_up(
    cpus: int, places: list[tuple[int, int, int]], pci: bool
) -> None:
    vdevs = [
        described(VdevSpec("v", f"v{n}", None, at, line(5)), kind("LNRO0005", size, irqs=irqs))
        for n, (at, size, irqs) in enumerate(places)
    ]
    check_image(tables_of((*FIXED, *vdevs, *(PCI if pci else ())), cpus=cpus, pci=pci))


def test_tables_that_do_not_fit_below_1_mib_are_refused() -> None:
    vdev = DIRECT[0]
    vdevs = [described(replace(vdev.spec, name=f"d{n}"), type(vdev.vdev)) for n in range(3000)]
    wanted = r"the ACPI tables of this machine take \d+ bytes, of 131072; give it fewer vdevs"
    with pytest.raises(QvmError, match=wanted):
        image_of((*FIXED, *vdevs))


def test_5_2_5_3_root_pointer() -> None:
    image = image_of()
    assert image.rsdp_address == 0xE0000
    rsdp = dict(image.blobs)[0xE0000]
    assert rsdp[:8] == b"RSD PTR "
    # Revision, RSDT (there is none), length.
    assert struct.unpack_from("<BII", rsdp, 15) == (2, 0, 36)
    assert len(rsdp) == 36


def test_5_2_10_firmware_control_structure() -> None:
    facs = tables_of()["facs"][1]
    assert (facs[:4], len(facs), facs[32]) == (b"FACS", 64, 2)
    assert sum(facs) == sum(b"FACS") + 64 + 2


@ACPICA
def test_5_2_9_fixed_description(tmp_path: Path) -> None:
    found = fields(disassemble(tables_of()["facp"][1], tmp_path, "facp"))
    wanted = {
        "Revision": "06",
        "SCI Interrupt": "0009",
        "SMI Command Port": "00000000",
        "PM1A Event Block Address": "00000600",
        "PM1A Control Block Address": "00000604",
        "PM Timer Block Address": "00000608",
        "PM1 Event Block Length": "04",
        "PM1 Control Block Length": "02",
        "PM Timer Block Length": "04",
        "GPE0 Block Length": "00",
        "8042 Present on ports 60/64 (V2)": "0",
        "VGA Not Present (V4)": "1",
        "MSI Not Supported (V4)": "0",
        "CMOS RTC Not Present (V5)": "0",
        "Control Method Power Button (V1)": "0",
        "Control Method Sleep Button (V1)": "1",
        "32-bit PM Timer (V1)": "1",
        "Reset Register Supported (V2)": "1",
        "Hardware Reduced (V5)": "0",
        "Value to cause reset": "01",
    }
    assert {name: found[name] for name in wanted} == wanted


def test_5_2_9_generic_addresses_are_the_ports_of_acpi_pm() -> None:
    facp = tables_of()["facp"][1]
    # I/O space, bits, first bit, size of an access, address.
    assert struct.unpack_from("<BBBBQ", facp, 116) == (1, 8, 0, 1, 0x60C)
    assert struct.unpack_from("<BBBBQ", facp, 148) == (1, 32, 0, 2, 0x600)
    assert struct.unpack_from("<BBBBQ", facp, 172) == (1, 16, 0, 2, 0x604)
    assert struct.unpack_from("<BBBBQ", facp, 208) == (1, 32, 0, 3, 0x608)
    assert not any(facp[at : at + 12] != bytes(12) for at in (160, 184, 196, 220, 232, 244, 256))


def test_acpi_pm_elsewhere_is_described_there() -> None:
    moved = described(replace(PM.spec, loc=0xB000, intr=line(10)), type(PM.vdev))
    named = tables_of((UART, RTC, moved))
    assert struct.unpack_from("<H", named["facp"][1], 46) == (10,)
    assert struct.unpack_from("<Q", named["facp"][1], 152) == (0xB000,)
    assert bytes.fromhex("020a000a0a0000000d00") in subtables(named["apic"][1])


def test_a_machine_without_power_management_is_refused() -> None:
    with pytest.raises(QvmError, match="the machine has no power management; list a vdev of type 'acpi-pm'"):
        image_of((UART, RTC))


def test_an_sci_that_acpi_cannot_name_is_refused() -> None:
    wrong = described(replace(PM.spec, intr=IntrSpec("apic", 40)), type(PM.vdev))
    with pytest.raises(
        QvmError, match=r'intr: the power management interrupt cannot be apic:40; write .*:9"'
    ):
        image_of((UART, wrong))


def test_without_a_clock_the_guest_does_not_look_for_one() -> None:
    def boot_flags(*vdevs: object) -> int:
        return int(struct.unpack_from("<H", tables_of(vdevs)["facp"][1], 109)[0])  # type: ignore[arg-type]

    assert boot_flags(UART, RTC, PM) & 1 << 5 == 0
    assert boot_flags(UART, PM) & 1 << 5 != 0


@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_5_2_12_interrupt_controllers(cpus: int) -> None:
    madt = tables_of(cpus=cpus)["apic"][1]
    # Local APICs; the two 8259s are there.
    assert struct.unpack_from("<II", madt, HEADER) == (0xFEE00000, 1)
    found = subtables(madt)
    assert found[:cpus] == [struct.pack("<BBBBI", 0, 8, n, n, 1) for n in range(cpus)]
    assert [each.hex() for each in found[cpus:]] == [
        "010c00000000c0fe00000000",  # the I/O APIC, from global interrupt 0
        "020a0000020000000500",  # timer: 0 is 2, edge, active high
        "020a0009090000000d00",  # SCI: level, active high
        "0406ff000001",  # LINT1 of every CPU is the NMI
    ]


def test_5_2_12_5_isa_interrupts_that_are_levels_are_overridden() -> None:
    level = kind("LNRO0005", 0x200, irqs=3, trigger=Trigger.LEVEL)
    at_14 = described(VdevSpec("d", "d0", None, 0xC000_0000, line(14)), level)
    far = described(VdevSpec("d", "d1", None, 0xC000_1000, line(16)), level)
    edge = described(VdevSpec("e", "e0", None, 0xC000_2000, line(7)), kind("LNRO0005", 0x200))
    vector = described(VdevSpec("v", "v0", None, 0xC000_3000, IntrSpec("apic", 13)), level)
    vdevs = (*FIXED, at_14, far, edge, vector, function(3, 0, line(11)), function(4))
    found = [each for each in subtables(tables_of(vdevs, pci=True)["apic"][1]) if each[0] == 2]
    assert [struct.unpack("<BBBBIH", each)[3:] for each in found] == [
        (0, 2, 0x5),
        *((number, number, 0xD) for number in (9, 11, 14, 15)),
    ]


def test_mcfg_has_bus_0() -> None:
    mcfg = tables_of((*FIXED, *PCI), pci=True)["mcfg"][1]
    assert struct.unpack_from("<QHBBI", mcfg, 44) == (0xF0000000, 0, 0, 0, 0)
    assert len(mcfg) == 60


@ACPICA
@pytest.mark.parametrize("name", ["facp", "apic", "mcfg", "facs", "xsdt"])
def test_iasl_makes_the_same_table_again(name: str, tmp_path: Path) -> None:
    blob = bytearray(tables_of((*FIXED, *PCI), cpus=3, pci=True)[name][1])
    disassemble(bytes(blob), tmp_path, name)
    again = bytearray(recompile(tmp_path, name))
    if name != "facs":
        # iasl signs its work in the last 8 bytes of the header, and so changes the checksum.
        for raw in (blob, again):
            assert sum(raw) & 0xFF == 0
            raw[9] = 0
            raw[28:36] = bytes(8)
    assert again == blob


@ACPICA
def test_iasl_would_complain(tmp_path: Path) -> None:
    blob = bytearray(tables_of()["facp"][1])
    blob[46] ^= 1
    with pytest.raises(AssertionError, match="Incorrect checksum"):
        disassemble(bytes(blob), tmp_path, "facp")


def test_the_checksum_follows_the_content() -> None:
    assert tables.table(b"MCFG", b"\x01")[9] == (tables.table(b"MCFG", b"\x00")[9] - 1) & 0xFF
