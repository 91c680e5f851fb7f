"""AML and resource descriptors, byte by byte as ACPI 6.3 writes them; chapter numbers in the names."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvmcore.acpi import aml, resources
from qvmcore.types import Trigger


def parse_package_length(raw: bytes) -> tuple[int, int]:
    """(the length, how many bytes it takes): 20.2.4, written anew."""
    further = raw[0] >> 6
    if not further:
        return raw[0] & 0x3F, 1
    assert raw[0] & 0x30 == 0
    value = raw[0] & 0xF
    for index in range(further):
        value |= raw[1 + index] << (4 + 8 * index)
    return value, 1 + further


@pytest.mark.parametrize(
    ("size", "encoded"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),  # 63 + 2 = 65 = 0x041
        (4093, "4fff"),
        (4094, "810001"),  # 4094 + 3 = 4097 = 0x01001
        ((1 << 20) - 4, "8fffff"),
        ((1 << 20) - 3, "c1000001"),
        ((1 << 28) - 5, "cfffffff"),
    ],
)
def test_20_2_4_package_length_at_its_boundaries(size: int, encoded: str) -> None:
    assert aml.package_length(size).hex() == encoded


def test_20_2_4_a_package_longer_than_28_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="an AML package has at most 268435455 bytes, not 268435452"):
        aml.package_length((1 << 28) - 4)


@given(st.one_of(st.integers(0, 5000), st.integers(0, (1 << 28) - 5)))
def test_20_2_4_package_length_counts_itself_and_is_shortest(size: int) -> None:
    raw = aml.package_length(size)
    assert parse_package_length(raw) == (size + len(raw), len(raw))
    # One byte less would not have held it.
    capacity = {1: 0, 2: 1 << 6, 3: 1 << 12, 4: 1 << 20}
    assert size + len(raw) - 1 >= capacity[len(raw)]


def test_20_2_2_names() -> None:
    assert aml.path("_HID") == b"_HID"
    assert aml.path("\\_SB") == b"\\_SB_"
    assert aml.path("\\_SB.PCI0") == b"\\\x2e_SB_PCI0"
    assert aml.path("A.B.C") == b"\x2f\x03A___B___C___"
    for wrong in ("", "\\", "abc", "TOOLONG", "1ABC", "A..B", "A B"):
        with pytest.raises(ValueError, match="no ACPI name"):
            aml.path(wrong)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x1_0000, "0c00000100"),
        (0xFFFF_FFFF, "0cffffffff"),
        (0x1_0000_0000, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_20_2_3_integers_take_the_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


def test_20_2_3_integers_outside_64_bits_are_refused() -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(ValueError, match="an AML integer has 64 bits"):
            aml.integer(value)


def test_20_2_3_strings_are_ascii() -> None:
    assert aml.string("ACPI0007") == b"\x0dACPI0007\0"
    for wrong in ("gäst", "a\0b"):
        with pytest.raises(ValueError, match="an AML string is ASCII without NUL"):
            aml.string(wrong)


def test_20_2_5_4_a_package_has_255_items_at_most() -> None:
    assert aml.package([aml.ONE] * 255)[:4] == b"\x12\x42\x10\xff"
    with pytest.raises(ValueError, match="an AML package has at most 255 items, not 256"):
        aml.package([aml.ONE] * 256)


def test_20_2_5_2_a_method_tells_its_arguments() -> None:
    assert aml.method("_OSC", 4, aml.return_(aml.ARG3)) == b"\x14\x08_OSC\x0c\xa4\x6b"
    with pytest.raises(ValueError, match="a method has 0 to 7 arguments, not 8"):
        aml.method("_OSC", 8)


def test_6_1_5_hardware_ids() -> None:
    # EisaId ("PNP0A03") is 0x030AD041, EisaId ("PNP0501") is 0x0105D041.
    assert aml.hardware_id("PNP0A03").hex() == "0c41d00a03"
    assert aml.hardware_id("PNP0501").hex() == "0c41d00501"
    assert aml.hardware_id("LNRO0005") == b"\x0dLNRO0005\0"
    for wrong in ("", "pnp0501", "PNP050", "PNP0501G", "LNRO000G", "ÄNP0501", "VIRTIO-MMIO"):
        with pytest.raises(ValueError, match="expected three capitals and four hexadecimal digits"):
            aml.hardware_id(wrong)


def test_19_6_141_a_uuid_swaps_its_first_three_groups() -> None:
    raw = aml.uuid("33db4d5b-1ff7-401c-9657-7441c03dd766")
    assert raw == b"\x11\x13\x0a\x10" + bytes.fromhex("5b4ddb33f71f1c4096577441c03dd766")


def test_6_4_2_9_end_tag() -> None:
    assert resources.template([]) == b"\x11\x05\x0a\x02\x79\x00"


def test_6_4_2_5_few_ports() -> None:
    assert resources.ports(0x3F8, 8).hex() == "4701f803f8030108"
    assert resources.ports(0xFF00, 0xFF).hex() == "470100ff00ff01ff"


def test_6_4_3_5_2_many_ports() -> None:
    # DWordIO: consumer, fixed ends, entire range; granularity, first, last, translation, length.
    raw = resources.ports(0, 0x1_0000)
    assert raw[:6].hex() == "871700010d03"
    assert struct.unpack("<5I", raw[6:]) == (0, 0, 0xFFFF, 0, 0x1_0000)


def test_6_4_3_4_memory_below_4_gib() -> None:
    assert resources.memory(0xC000_0000, 0x200).hex() == "86090001000000c000020000"
    # The last byte below 4 GiB still fits.
    assert resources.memory(0xFFFF_F000, 0x1000)[0] == 0x86


def test_6_4_3_5_1_memory_above_4_gib() -> None:
    raw = resources.memory(0xFFFF_F000, 0x1001)
    assert raw[:6].hex() == "8a2b00000d01"
    assert struct.unpack("<5Q", raw[6:]) == (0, 0xFFFF_F000, 0x1_0000_0000, 0, 0x1001)


@pytest.mark.parametrize(("trigger", "flags"), [(Trigger.LEVEL, 0b001), (Trigger.EDGE, 0b011)])
def test_6_4_3_6_interrupts_are_active_high_and_not_shared(trigger: Trigger, flags: int) -> None:
    raw = resources.interrupts(range(5, 7), trigger)
    assert struct.unpack("<BHBBII", raw) == (0x89, 10, flags, 2, 5, 6)


def test_6_4_3_5_windows_of_a_bridge_are_produced() -> None:
    bus = struct.unpack("<BHBBB5H", resources.bus_window(0, 0))
    assert bus == (0x88, 13, 2, 0x0C, 0, 0, 0, 0, 0, 1)
    narrow = struct.unpack("<BHBBB5I", resources.memory_window(0xD000_0000, 0x2000_0000))
    assert narrow == (0x87, 23, 0, 0x0C, 1, 0, 0xD000_0000, 0xEFFF_FFFF, 0, 0x2000_0000)
    wide = struct.unpack("<BHBBB5Q", resources.memory_window(1 << 38, 1 << 38))
    assert wide == (0x8A, 43, 0, 0x0C, 1, 0, 1 << 38, (1 << 39) - 1, 0, 1 << 38)
