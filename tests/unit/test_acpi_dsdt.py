"""The DSDT as ACPICA sees it: disassembled by iasl, compiled again, and executed by acpiexec."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qvmcore.boards import DescribedVdev
from qvmcore.errors import PluginError, QvmError
from qvmcore.types import IntrSpec
from tests.unit.acpifiles import (
    ACPICA,
    DIRECT,
    FIXED,
    PCI,
    described,
    disassemble,
    execute,
    function,
    kind,
    recompile,
    tables_of,
)


def dsdt(*vdevs: DescribedVdev, cpus: int = 1, pci: bool = False) -> bytes:
    return tables_of((*FIXED, *vdevs), cpus=cpus, pci=pci)["dsdt"][1]


ALL = dsdt(*DIRECT, *PCI, cpus=2, pci=True)


def device(text: str, name: str) -> str:
    """One device of a disassembly, comments and white space made small."""
    match = re.search(
        rf"^        Device \({name}\)\n        \{{\n(.*?)\n        \}}\n", text, re.MULTILINE | re.DOTALL
    )
    assert match, f"no device {name} in\n{text}"
    return re.sub(r"\s+", " ", re.sub(r"//.*|/\*.*?\*/", "", match[1]))


def numbers(said: str) -> list[int]:
    """The integers that acpiexec printed."""
    return [int(each, 16) for each in re.findall(r"\[Integer\] = ([0-9A-F]+)", said)]


MACHINES = pytest.mark.parametrize(
    ("vdevs", "cpus", "pci"),
    [((), 1, False), ((), 1, True), ((*DIRECT, *PCI), 2, True), (DIRECT, 255, False)],
    ids=["least", "empty-bus", "all", "many-cpus"],
)


@ACPICA
@MACHINES
def test_iasl_makes_the_same_table_again(
    vdevs: tuple[DescribedVdev, ...], cpus: int, pci: bool, tmp_path: Path
) -> None:
    blob = dsdt(*vdevs, cpus=cpus, pci=pci)
    disassemble(blob, tmp_path, "dsdt")
    # iasl keeps its own name and the checksum in the header; the code is byte for byte ours.
    assert recompile(tmp_path, "dsdt")[36:] == blob[36:]


@ACPICA
@MACHINES
def test_acpiexec_evaluates_every_name(
    vdevs: tuple[DescribedVdev, ...], cpus: int, pci: bool, tmp_path: Path
) -> None:
    said = execute(tmp_path, dsdt(*vdevs, cpus=cpus, pci=pci), "execute predefined", "resources *")
    # Nothing here has a _SRS, which the command "resources" tries as well.
    failed = set(re.findall(r".*AE_(?!OK).*", said)) - {"AcpiSetCurrentResources failed: AE_NOT_FOUND"}
    assert not failed
    evaluated = set(re.findall(r"^(\S+)\s+returned AE_OK", said, re.MULTILINE))
    wanted = {f"\\_SB_.C{n:03X}._UID" for n in range(cpus)} | {"\\_S5_", "\\_SB_.MBRD._CRS"}
    assert wanted | ({"\\_SB_.PCI0._OSC"} if pci else set()) <= evaluated
    # "resources" turns each _CRS into a list and back, and tells of a byte that is not the same.
    assert said.count("Resource Conversion Comparison:") == said.count("Evaluating _CRS") >= 3
    assert "ismatch" not in said.replace("type mismatch - Found [Integer]", "")


@ACPICA
def test_7_4_2_power_off_is_sleep_type_5(tmp_path: Path) -> None:
    assert numbers(execute(tmp_path, ALL, "evaluate \\_S5")) == [5, 0, 0, 0]
    text = disassemble(ALL, tmp_path, "dsdt")
    assert not re.search(r"_S[0-4]_?,", text)


@ACPICA
def test_processors_have_the_ids_of_the_madt(tmp_path: Path) -> None:
    text = disassemble(dsdt(cpus=255), tmp_path, "dsdt")
    assert device(text, "C000").strip() == 'Name (_HID, "ACPI0007" ) Name (_UID, Zero)'
    assert device(text, "C0FE").strip() == 'Name (_HID, "ACPI0007" ) Name (_UID, 0xFE)'
    assert text.count("Device (C") == 255


@ACPICA
def test_direct_vdevs_are_announced_with_place_and_interrupt(tmp_path: Path) -> None:
    text = disassemble(ALL, tmp_path, "dsdt")
    uart = device(text, "V000")
    assert 'EisaId ("PNP0501")' in uart
    assert "IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, )" in uart
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }" in uart
    assert 'EisaId ("PNP0B00")' in device(text, "V001")
    disk, net = device(text, "V002"), device(text, "V003")
    for each, uid, base, number in ((disk, "Zero", "0xC0000000", "05"), (net, "One", "0xC0001000", "06")):
        assert f'Name (_HID, "LNRO0005") Name (_UID, {uid})' in each
        assert f"Memory32Fixed (ReadWrite, {base}, 0x00000200, )" in each
        assert f"Level, ActiveHigh, Exclusive, ,, ) {{ 0x000000{number}, }}" in each
    far = device(text, "V004")
    assert 'Name (_HID, EisaId ("QVM0001")) Name (_UID, Zero)' in far
    assert re.findall(r"0x0000002\w+", far) == [
        "0x0000002000000000", "0x00000020000001FF", "0x0000002000000200", "0x00000020000011FF",
    ]  # fmt: skip
    assert "Edge, ActiveHigh, Exclusive, ,, ) { 0x0000000A, 0x0000000B, }" in far
    wide = device(text, "V005")
    assert "DWordIO (ResourceConsumer" in wide
    assert "Interrupt" not in wide
    # quiet0 has no ID, acpi-pm neither, and PCI functions are found by enumeration.
    assert len(re.findall(r"Device \(V", text)) == 6


@ACPICA
def test_an_interrupt_that_is_no_input_of_the_io_apic_is_left_out(tmp_path: Path) -> None:
    vdev = described(replace(DIRECT[0].spec, intr=IntrSpec("apic", 40)), type(DIRECT[0].vdev))
    disk = device(disassemble(dsdt(vdev), tmp_path, "dsdt"), "V002")
    assert "Memory32Fixed" in disk
    assert "Interrupt" not in disk


@ACPICA
def test_motherboard_resources_keep_power_management_and_configuration_space(tmp_path: Path) -> None:
    board = device(disassemble(ALL, tmp_path, "dsdt"), "MBRD")
    assert 'EisaId ("PNP0C02")' in board
    assert "IO (Decode16, 0x0600, 0x0600, 0x01, 0x10, )" in board
    assert "Memory32Fixed (ReadWrite, 0xF0000000, 0x00100000, )" in board
    assert "Memory" not in device(disassemble(dsdt(), tmp_path, "least"), "MBRD")


@ACPICA
def test_the_pci_host_bridge(tmp_path: Path) -> None:
    bridge = device(disassemble(ALL, tmp_path, "dsdt"), "PCI0")
    assert 'Name (_HID, EisaId ("PNP0A08") ) Name (_CID, EisaId ("PNP0A03") )' in bridge
    assert "Name (_SEG, Zero) Name (_BBN, Zero)" in bridge
    crs = bridge[bridge.index("ResourceTemplate") : bridge.index("_PRT")]
    assert "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0x0000, 0x0000, 0x0000," in crs
    assert "IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08, )" in crs
    assert "0x00000000, 0xD0000000, 0xEFFFFFFF, 0x00000000, 0x20000000," in crs
    assert "0x0000004000000000, 0x0000007FFFFFFFFF, 0x0000000000000000, 0x0000004000000000," in crs
    assert crs.count("ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite") == 2
    assert "PCI0" not in disassemble(dsdt(*DIRECT), tmp_path, "none")


@ACPICA
def test_6_2_13_pci_routes_are_swizzled_or_as_given(tmp_path: Path) -> None:
    flat = numbers(execute(tmp_path, ALL, "evaluate \\_SB.PCI0._PRT"))
    routes = [tuple(flat[at : at + 4]) for at in range(0, len(flat), 4)]
    # Address (any function), pin, no link device, global interrupt. Pin A of device 6 is its intr.
    assert routes == [
        (0x01FFFF, 0, 0, 21), (0x01FFFF, 1, 0, 22), (0x01FFFF, 2, 0, 23), (0x01FFFF, 3, 0, 20),
        (0x06FFFF, 0, 0, 11), (0x06FFFF, 1, 0, 23), (0x06FFFF, 2, 0, 20), (0x06FFFF, 3, 0, 21),
        (0x1FFFFF, 0, 0, 23), (0x1FFFFF, 1, 0, 20), (0x1FFFFF, 2, 0, 21), (0x1FFFFF, 3, 0, 22),
    ]  # fmt: skip


@ACPICA
def test_a_full_bus_is_routed(tmp_path: Path) -> None:
    full = dsdt(*(function(number) for number in range(1, 32)), pci=True)
    flat = numbers(execute(tmp_path, full, "evaluate \\_SB.PCI0._PRT"))
    assert flat[0::4] == [number << 16 | 0xFFFF for number in range(1, 32) for _ in range(4)]


@ACPICA
def test_a_function_with_a_vector_of_its_own_has_no_route(tmp_path: Path) -> None:
    lonely = dsdt(function(1, 0, IntrSpec("apic", 40)), pci=True)
    assert "_PRT" not in disassemble(lonely, tmp_path, "dsdt")


OSC_UUID = "5b 4d db 33 f7 1f 1c 40 96 57 74 41 c0 3d d7 66"


@ACPICA
@pytest.mark.parametrize(
    ("uuid", "revision", "asked", "status", "granted"),
    [
        (OSC_UUID, 1, 0x1D, 0, 0x1D),
        (OSC_UUID, 1, 0x13F, 0x10, 0x1F),
        (OSC_UUID, 2, 0x1D, 0x08, 0x1D),
        ("00" + OSC_UUID[2:], 1, 0x1D, 0x04, 0x1D),
    ],
    ids=["all", "some", "revision", "uuid"],
)
def test_6_2_11_osc_grants_what_has_no_other_owner(
    uuid: str, revision: int, asked: int, status: int, granted: int, tmp_path: Path
) -> None:
    words = " ".join(f"{byte:02x}" for word in (0, 0x1F, asked) for byte in word.to_bytes(4, "little"))
    said = execute(tmp_path, ALL, f"evaluate \\_SB.PCI0._OSC ({uuid}) {revision} 3 ({words})")
    dump = re.search(r"\[Buffer\] Length 0C =\s+((?:\w+: )?(?:[0-9A-F]{2} ?)+)", said)
    assert dump, said
    raw = bytes.fromhex(dump[1].split(":")[-1])
    assert [int.from_bytes(raw[at : at + 4], "little") for at in (0, 4, 8)] == [status, 0x1F, granted]


def test_a_wrong_hardware_id_is_the_plugins_fault() -> None:
    vdev = described(replace(DIRECT[0].spec, label="vdev[3] (disk)"), kind("virtio-mmio", 0x200))
    wanted = r"vdev\[3\] \(disk\): acpi_hid: expected three capitals .* not 'virtio-mmio'; report it"
    with pytest.raises(PluginError, match=wanted):
        dsdt(vdev)


def test_more_vdevs_than_names_are_refused() -> None:
    with pytest.raises(QvmError, match=r"4099 vdevs are more than ACPI tables name \(4096\)"):
        dsdt(*[DIRECT[0]] * 4097)
