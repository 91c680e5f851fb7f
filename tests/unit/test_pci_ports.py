"""PCI configuration by the ports 0xCF8 and 0xCFC (PCI 3.0, 3.2.2.3.2)."""

from __future__ import annotations

import pytest

from qvmcore.pci.ports import CONFIG_PORTS, ConfigPorts

ENABLE = 1 << 31


class Ecam:
    """A configuration space of numbers: every byte is the low byte of its offset."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return int.from_bytes(bytes((offset + index) & 0xFF for index in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


@pytest.fixture
def ecam() -> Ecam:
    return Ecam()


@pytest.fixture
def ports(ecam: Ecam) -> ConfigPorts:
    return ConfigPorts(ecam.read, ecam.write)


def address(device: int, function: int, register: int, bus: int = 0) -> int:
    return ENABLE | bus << 16 | device << 11 | function << 8 | register


def test_the_window_is_two_registers_of_four_bytes() -> None:
    assert CONFIG_PORTS.size == 8
    assert CONFIG_PORTS.access == {1, 2, 4}


@pytest.mark.parametrize(("byte", "size"), [(0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (3, 1)])
def test_3_2_2_3_2_the_data_register_is_the_addressed_one(
    ports: ConfigPorts, ecam: Ecam, byte: int, size: int
) -> None:
    ports.write(0, 4, address(5, 3, 0x40))
    place = (5 << 15) + (3 << 12) + 0x40 + byte
    assert ports.read(4 + byte, size) == ecam.read(place, size)
    ports.write(4 + byte, size, 1)
    assert ecam.writes == [(place, size, 1)]


def test_3_2_2_3_2_the_address_register_reads_back_without_its_reserved_bits(ports: ConfigPorts) -> None:
    assert ports.read(0, 4) == 0
    ports.write(0, 4, 0xFFFF_FFFF)
    assert ports.read(0, 4) == 0x80FF_FFFC


@pytest.mark.parametrize("size", [1, 2])
def test_3_2_2_3_2_a_narrow_access_does_not_reach_the_address_register(ports: ConfigPorts, size: int) -> None:
    ports.write(0, 4, address(1, 0, 0))
    ports.write(0, size, 0)
    ports.write(3, 1, 0)
    assert ports.read(0, 4) == address(1, 0, 0)
    assert ports.read(0, size) == (1 << 8 * size) - 1


@pytest.mark.parametrize(
    "value", [address(1, 0, 0) & ~ENABLE, address(1, 0, 0, bus=1)], ids=["not enabled", "another bus"]
)
def test_nobody_there_reads_all_ones_and_drops_writes(ports: ConfigPorts, ecam: Ecam, value: int) -> None:
    ports.write(0, 4, value)
    assert ports.read(4, 4) == 0xFFFF_FFFF
    ports.write(4, 4, 0)
    assert not ecam.reads and not ecam.writes


def test_an_access_over_the_end_of_the_data_register_goes_nowhere(ports: ConfigPorts, ecam: Ecam) -> None:
    ports.write(0, 4, address(1, 0, 0xFC))
    assert ports.read(7, 2) == 0xFFFF
    assert not ecam.reads
