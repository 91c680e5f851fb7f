"""Fake vdevs and a fake plugin host for the tests of composing, layout, boards and CLI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from qvmcore.errors import PluginError
from qvmcore.options import HostPath, Size
from qvmcore.plugins import EntryInfo
from qvmcore.types import Trigger, Window
from qvmcore.vdev import FdtNode, Vdev


class DiskOptions(msgspec.Struct, frozen=True, rename="kebab"):
    hostdev: HostPath
    read_only: Annotated[bool, msgspec.Meta(description="the guest cannot write")] = False
    block_size: Annotated[Size, msgspec.Meta(ge=512, le=4096)] = Size(512)


class Disk(Vdev):
    vdev_type = "disk"
    summary = "a disk"
    Options = DiskOptions
    windows = (Window(0x200),)
    irqs = 1
    fdt_compatible = ("virtio,mmio",)


class NetOptions(msgspec.Struct, frozen=True):
    peer: str = ""


class Net(Vdev):
    vdev_type = "net"
    Options = NetOptions
    windows = (Window(0x200), Window(0x1000))
    irqs = 2
    fdt_compatible = ("test,net",)


class Silent(Vdev):
    vdev_type = "silent"


class UartOptions(msgspec.Struct, frozen=True):
    hostdev: str = "null"


class Pl011(Vdev):
    vdev_type = "pl011"
    Options = UartOptions
    windows = (Window(0x1000),)
    irqs = 1
    trigger = Trigger.LEVEL
    fdt_compatible = ("arm,pl011", "arm,primecell")

    @classmethod
    def claims(cls, options: UartOptions) -> tuple[str, ...]:
        return ("standard input", "standard output") if options.hostdev == "stdio" else ()

    def describe_fdt(self, node: FdtNode) -> None:
        node.set_cells("clocks", node.reference("/apb-pclk"), node.reference("/apb-pclk"))
        node.set_string("clock-names", "uartclk", "apb_pclk")


class Pl061(Pl011):
    vdev_type = "pl061"
    fdt_compatible = ("arm,pl061", "arm,primecell")

    def describe_fdt(self, node: FdtNode) -> None:
        node.set_cells("clocks", node.reference("/apb-pclk"))
        node.set_string("clock-names", "apb_pclk")
        node.set_flag("gpio-controller")
        node.set_cells("#gpio-cells", 2)
        node.set_flag("interrupt-controller")
        node.set_cells("#interrupt-cells", 2)
        keys = node.sibling("gpio-keys")
        keys.set_string("compatible", "gpio-keys")
        key = keys.child("poweroff")
        key.set_cells("linux,code", 116)
        key.set_cells("gpios", node.phandle(), 3, 0)


CLASSES: Mapping[str, type[Vdev]] = {cls.vdev_type: cls for cls in (Disk, Net, Silent, Pl011, Pl061)}


class FakeHost:
    """The part of PluginHost that composing asks."""

    def __init__(self) -> None:
        self.engines = {"emulated": _entry("emulated", "engine"), "kvm": _entry("kvm", "engine", "no API v1")}

    def vdev_class(self, vdev_type: str) -> type[Vdev]:
        try:
            return CLASSES[vdev_type]
        except KeyError:
            raise PluginError(
                f"unknown vdev type {vdev_type!r}", hint="it comes with qvm-x: pip install qvm-x"
            ) from None

    def vdev_types(self) -> Mapping[str, EntryInfo]:
        return {name: _entry(name, "vdev") for name in CLASSES}

    def engine_names(self) -> Mapping[str, EntryInfo]:
        return self.engines


def _entry(name: str, kind: str, problem: str = "") -> EntryInfo:
    return EntryInfo(name, f"qvm.{kind}.v1", "qvm-fake", "1.0", problem=problem)


BASE = """\
[system]
board = "arm64-virt"
ram = "64M"
[load]
kernel = "Image"
"""

DISK = """\
[[vdev]]
type = "disk"
name = "disk0"
loc = 0x1c0d0000
intr = "gic:41"
hostdev = "disk.img"
"""


def write_files(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write VM files and an Image; the path of the first file."""
    (folder / "Image").write_bytes(b"kernel")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / next(iter(files))
