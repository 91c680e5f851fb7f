"""pci-dummy: identity, constant bytes, nothing writable, and bad input."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_pci_dummy import PciDummy
from qvm_pci_dummy.registers import parse_registers

from qvmcore.api import ConfigError, HostError
from qvmcore.testing.conformance import TerminationConformance, VdevConformance
from qvmcore.testing.fakes import Plugged
from qvmcore.testing.pci import PciConformance

Plug = Callable[..., Plugged[PciDummy]]


class TestPciDummy(VdevConformance, PciConformance, TerminationConformance):
    vdev_class = PciDummy
    options = {"vendor": 0x1234, "reg": ["0x40/4=0x12345678"]}


def identity(device: Plugged[Any]) -> tuple[int, ...]:
    """vendor, device, revision, class, subsystem vendor, subsystem."""
    config = device.device
    assert config is not None
    places = ((0, 2), (2, 2), (8, 1), (9, 3), (0x2C, 2), (0x2E, 2))
    return tuple(config.read(offset, size) for offset, size in places)


def test_without_options_it_is_unassigned(qvm_plug: Plug) -> None:
    assert identity(qvm_plug(PciDummy)) == (0x1C05, 0x00FF, 0, 0xFF0000, 0, 0)


def test_every_key_of_the_identity(qvm_plug: Plug) -> None:
    table = {"vendor": 0x8086, "device": 0x1234, "class": 0x068000, "revision": 7,
             "subsystem-vendor": 0x1AF4, "subsystem": 0x1100}  # fmt: skip
    assert identity(qvm_plug(PciDummy, table)) == (0x8086, 0x1234, 7, 0x068000, 0x1AF4, 0x1100)


def test_registers_are_read_and_nothing_is_writable(qvm_plug: Plug) -> None:
    config = qvm_plug(PciDummy, reg=["0x40/4=0x12345678", "0x44/1=9", "0xff8/8=0x1122334455667788"]).device
    assert config is not None
    assert [config.read(0x40, 4), config.read(0x41, 2), config.read(0x43, 2)] == [0x12345678, 0x3456, 0x0912]
    assert config.read(0xFF8, 8) == 0x1122334455667788
    before = [config.read(offset, 4) for offset in range(0, 4096, 4)]
    for offset in range(0, 4096, 4):
        config.write(offset, 0xFFFFFFFF)
    assert [config.read(offset, 4) for offset in range(0, 4096, 4)] == before


def header(**changes: int) -> bytes:
    """A host's configuration space, as sysfs shows it."""
    data = bytearray(64)
    struct.pack_into("<HH", data, 0, 0x8086, 0x10D3)
    data[8:12] = bytes([3, 0, 0, 2])
    data[0x0E] = changes.get("header_type", 0)
    struct.pack_into("<HH", data, 0x2C, 0x8086, 0xA01F)
    return bytes(data)


def test_clone_takes_the_identity_and_a_key_wins(qvm_plug: Plug, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(header(header_type=0x80))
    cloned = qvm_plug(PciDummy, clone="config", base_dir=tmp_path)
    assert identity(cloned) == (0x8086, 0x10D3, 3, 0x020000, 0x8086, 0xA01F)
    changed = qvm_plug(PciDummy, clone="config", device=1, revision=0, base_dir=tmp_path)
    assert identity(changed) == (0x8086, 1, 0, 0x020000, 0x8086, 0xA01F)


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "No such file"), (b"short", "5 bytes"), (header(header_type=1), "it is a bridge")],
)
def test_a_device_that_cannot_be_cloned(
    qvm_plug: Plug, tmp_path: Path, content: bytes | None, text: str
) -> None:
    if content is not None:
        (tmp_path / "config").write_bytes(content)
    with pytest.raises(HostError, match=text):
        qvm_plug(PciDummy, clone="config", base_dir=tmp_path)


def test_an_address_means_the_host_s_device(qvm_plug: Plug) -> None:
    with pytest.raises(HostError, match=r"/sys/bus/pci/devices/0000:ff:1f\.7/config"):
        qvm_plug(PciDummy, clone="ff:1f.7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x40=1", "expected OFFSET/SIZE=VALUE"),
        ("x/4=1", "expected OFFSET/SIZE=VALUE"),
        ("0x40/3=1", "the size is 1, 2, 4 or 8, not 3"),
        ("0x3c/4=1", "behind the header"),
        ("0xffd/4=1", "behind the header"),
        ("0x40/1=256", "0x100 does not fit 1 bytes"),
    ],
)
def test_bad_registers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_registers([text])


def test_a_byte_has_one_value(qvm_plug: Plug) -> None:
    assert parse_registers(["0x40/2=0x0101", "0x41/1=1"]) == {0x40: 1, 0x41: 1}
    with pytest.raises(ConfigError, match="byte 0x41 was given another value"):
        qvm_plug(PciDummy, reg=["0x40/2=0x0101", "0x41/1=2"])
