"""`qvm show` of a machine with PCI: the bus as a guest will find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvmcore.cli import main
from qvmcore.pci.vdev import BarWindow, PciVdev
from qvmcore.testing.engine import ScriptedEngine
from qvmcore.testing.host import StaticHost
from qvmcore.types import PciId, Window
from qvmcore.virtio.device import VirtioVdev
from tests.unit.vmfiles import CLASSES, write_files


class Card(PciVdev):
    vdev_type = "card"
    pci_id = PciId(0x1234, 0xABCD, 0x5678, 0x0001)
    pci_class = 0x028000
    windows = (BarWindow(1 << 20, wide=True, prefetchable=True), Window(0x100))
    irqs = 1


class Unknown(PciVdev):
    vdev_type = "unknown"


class Disk(VirtioVdev):
    vdev_type = "vdisk"
    device_id = 2
    queue_sizes = (8,) * 300


FILE = """\
[system]
board = "arm64-virt"
ram = "64M"
[load]
kernel = "Image"
[[vdev]]
type = "vdisk"
[[vdev]]
type = "card"
[[vdev]]
type = "unknown"
loc = "pci:0:1.3"
"""

ROWS = [
    "  00:00.0  1c05:0002  06/00/00  0000:0000                                              host bridge",
    "  00:01.3  ?          ?         ?                                                      unknown-0",
    "  00:02.0  1af4:1042  01/80/00  1c05:0042  0: 16K 64-bit, 2: 8K                        vdisk-0",
    "  00:03.0  1234:abcd  02/80/00  5678:0001  0: 1M 64-bit prefetchable, 2: 256 bytes, 3: 4K  card-0",
]


@pytest.fixture
def host() -> StaticHost:
    """The fakes of the other tests, and ours."""
    return StaticHost([*CLASSES.values(), Card, Unknown, Disk], ScriptedEngine(lambda guest: None))


def show(capsysbinary: Any, host: StaticHost, tmp_path: Path, *args: str) -> str:
    filler = '[[vdev]]\ntype = "unknown"\nname = "zero"\nloc = "pci:0:1"\n'
    path = write_files(tmp_path, {"vm.toml": FILE + filler})
    assert main(["show", str(path), *args], host=host) == 0
    out: bytes = capsysbinary.readouterr().out
    return out.decode()


def test_the_tree_for_people(capsysbinary: Any, host: StaticHost, tmp_path: Path) -> None:
    text = show(capsysbinary, host, tmp_path)
    wanted = [" ".join(row.split()) for row in ROWS]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "PCI bus 0:" in lines
    assert [line for line in lines if line in wanted] == wanted
    assert "00:01.0 ? ? ? zero" in lines


def test_the_tree_for_programs(capsysbinary: Any, host: StaticHost, tmp_path: Path) -> None:
    data = json.loads(show(capsysbinary, host, tmp_path, "--json"))
    assert data["pci"][-1] == {
        "address": "00:03.0", "ids": "1234:abcd", "class": "02/80/00", "subsystem": "5678:0001",
        "bars": ["0: 1M 64-bit prefetchable", "2: 256 bytes", "3: 4K"], "owner": "card-0",
    }  # fmt: skip
    assert [vdev["pci"] for vdev in data["vdevs"] if vdev["name"] == "vdisk-0"] == ["00:02.0"]
