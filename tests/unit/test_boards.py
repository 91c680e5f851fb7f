"""The board arm64-virt: its device tree is correct for dtc, for dtschema, and for what we promise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fdt
import pytest

from qvmcore import boards
from qvmcore.boards import DescribedVdev, Placement
from qvmcore.types import IntrSpec, LoadSpec, MachineSpec, MemorySpec, PciAddress, VdevSpec
from tests.unit.vmfiles import CLASSES

BOARD = boards.get("arm64-virt")


def machine(**changes: Any) -> tuple[MachineSpec, list[DescribedVdev]]:
    vdevs = [VdevSpec(each.type, each.name, None, each.loc, each.intr) for each in BOARD.implicit]
    vdevs.append(VdevSpec("disk", "disk0", None, 0x1C0D0000, IntrSpec("gic", 41)))
    vdevs.append(VdevSpec("net", "net0", None, 0x1C0E0000, IntrSpec("gic", 42)))
    vdevs.append(VdevSpec("silent", "quiet"))
    fields: dict[str, Any] = {
        "name": "vm", "board": "arm64-virt", "engine": "auto", "cpus": 1, "vdevs": tuple(vdevs),
        "memory": (MemorySpec(0x40000000, 0x2000_0000), MemorySpec(0, 0x1000, rom=True)),
        "load": LoadSpec(cmdline="console=hvc0"),
    }  # fmt: skip
    # describe_fdt() of the fakes uses neither context nor options.
    described = [DescribedVdev(spec, CLASSES[spec.type](None, None)) for spec in vdevs]  # type: ignore[arg-type]
    return MachineSpec(**fields | changes), described


def tree(placement: Placement | None = None, **changes: Any) -> Any:
    spec, vdevs = machine(**changes)
    return fdt.parse_dtb(BOARD.build_fdt(spec, vdevs, placement))


def cells(node: Any, name: str) -> list[int]:
    data: list[int] = node.get_property(name).data
    return data


def test_names_and_unknown_boards() -> None:
    assert boards.names() == ("arm64-virt", "x86_64-pc")
    with pytest.raises(KeyError):
        boards.get("x86-pc")


def test_a_vdev_is_announced_with_place_and_interrupt() -> None:
    disk = tree().get_node("/virtio@1c0d0000")
    assert disk.get_property("compatible").data == ["virtio,mmio"]
    assert cells(disk, "reg") == [0, 0x1C0D0000, 0, 0x200]
    # gic:41 is SPI 9; edge, rising.
    assert cells(disk, "interrupts") == [0, 9, 1]
    assert disk.exist_property("dma-coherent")


def test_windows_and_interrupts_of_a_larger_vdev() -> None:
    net = tree().get_node("/net@1c0e0000")
    assert cells(net, "reg") == [0, 0x1C0E0000, 0, 0x200, 0, 0x1C0E0200, 0, 0x1000]
    assert cells(net, "interrupts") == [0, 10, 1, 0, 11, 1]
    assert not net.exist_property("dma-coherent")


def test_a_level_interrupt_is_active_high() -> None:
    assert cells(tree().get_node("/serial@9000000"), "interrupts") == [0, 1, 4]


def test_controller_timer_and_cpus() -> None:
    dt = tree(cpus=4)
    gic = dt.get_node("/interrupt-controller@8000000")
    assert cells(gic, "reg") == [0, 0x08000000, 0, 0x10000, 0, 0x08010000, 0, 0x10000]
    assert cells(gic, "#interrupt-cells") == [3]
    assert cells(dt.get_node("/"), "interrupt-parent") == cells(gic, "phandle")
    timer = cells(dt.get_node("/timer"), "interrupts")
    assert timer[1::3] == [13, 14, 11, 10]
    assert all(flags & 0xF == 8 for flags in timer[2::3])
    assert [cells(dt.get_node(f"/cpus/cpu@{i}"), "reg") for i in range(4)] == [[0], [1], [2], [3]]
    assert dt.get_node("/psci").get_property("method").data == ["hvc"]


def test_memory_has_ram_only() -> None:
    dt = tree()
    assert cells(dt.get_node("/memory@40000000"), "reg") == [0, 0x40000000, 0, 0x20000000]
    assert not dt.exist_node("/memory@0")


def test_chosen() -> None:
    chosen = tree(Placement(0, 0, 0, (0x44000000, 0x44001234))).get_node("/chosen")
    assert chosen.get_property("bootargs").data == ["console=hvc0"]
    assert chosen.get_property("stdout-path").data == ["/serial@9000000"]
    assert cells(chosen, "linux,initrd-start") == [0, 0x44000000]
    assert cells(chosen, "linux,initrd-end") == [0, 0x44001234]
    assert not tree().get_node("/chosen").exist_property("linux,initrd-start")


def test_seeds_are_fresh_in_every_tree() -> None:
    spec, vdevs = machine()
    assert BOARD.build_fdt(spec, vdevs) != BOARD.build_fdt(spec, vdevs)


def test_nothing_dangles_without_a_serial_port() -> None:
    spec, vdevs = machine()
    dt = fdt.parse_dtb(BOARD.build_fdt(spec, vdevs[2:]))
    assert not dt.get_node("/chosen").exist_property("stdout-path")


def with_pci(*functions: VdevSpec, **changes: Any) -> tuple[MachineSpec, list[DescribedVdev]]:
    """The machine with these vdevs on PCI besides the others."""
    spec, vdevs = machine(pci=True, **changes)
    described = [DescribedVdev(each, CLASSES["disk"](None, None)) for each in functions]  # type: ignore[arg-type]
    return replace(spec, vdevs=(*spec.vdevs, *functions)), [*vdevs, *described]


FUNCTIONS = (
    VdevSpec("disk", "disk1", pci=PciAddress(1)),
    VdevSpec("disk", "disk6", pci=PciAddress(6)),
    VdevSpec("disk", "disk61", pci=PciAddress(6, 1), intr=IntrSpec("gic", 50)),
    VdevSpec("disk", "disk31", pci=PciAddress(31)),
)


def test_without_pci_there_is_no_host_and_no_frame() -> None:
    dt = tree()
    assert not dt.exist_node("/pcie@10000000")
    assert cells(dt.get_node("/interrupt-controller@8000000"), "#address-cells") == [0]


def test_the_pci_host() -> None:
    dt = fdt.parse_dtb(BOARD.build_fdt(*with_pci(*FUNCTIONS)))
    host = dt.get_node("/pcie@10000000")
    assert cells(host, "reg") == [0, 0x10000000, 0, 0x100000]
    assert cells(host, "bus-range") == [0, 0]
    assert cells(host, "ranges") == [
        0x02000000, 0, 0x20000000, 0, 0x20000000, 0, 0x1F000000,
        0x03000000, 0x80, 0, 0x80, 0, 0x80, 0,
    ]  # fmt: skip
    assert host.exist_property("dma-coherent")
    frame = dt.get_node("/interrupt-controller@8000000/v2m@8020000")
    assert cells(host, "msi-parent") == cells(frame, "phandle")
    assert cells(frame, "reg") == [0, 0x8020000, 0, 0x1000]
    # A PCI function has no node of its own.
    assert [node.name for node in dt.root.nodes if "virtio" in node.name] == ["virtio@1c0d0000"]


def test_interrupts_of_pci_devices_are_swizzled_or_as_given() -> None:
    dt = fdt.parse_dtb(BOARD.build_fdt(*with_pci(*FUNCTIONS)))
    gic = cells(dt.get_node("/interrupt-controller@8000000"), "phandle")[0]
    host = dt.get_node("/pcie@10000000")
    assert cells(host, "interrupt-map-mask") == [0xF800, 0, 0, 7]
    # Device, pin A -> SPI, level. gic:36 is SPI 4, gic:50 is SPI 18, gic:38 is SPI 6.
    assert cells(host, "interrupt-map") == [
        0x0800, 0, 0, 1, gic, 0, 0, 0, 4, 4,
        0x3000, 0, 0, 1, gic, 0, 0, 0, 18, 4,
        0xF800, 0, 0, 1, gic, 0, 0, 0, 6, 4,
    ]  # fmt: skip


def _blob(folder: Path, functions: tuple[VdevSpec, ...] | None = None) -> Path:
    spec, vdevs = machine(cpus=2) if functions is None else with_pci(*functions)
    path = folder / "vm.dtb"
    path.write_bytes(BOARD.build_fdt(spec, vdevs, Placement(0, 0, 0, (0x44000000, 0x44001234))))
    return path


#: Without PCI, with a bus that is empty, and with functions on it.
TREES = pytest.mark.parametrize("functions", [None, (), FUNCTIONS], ids=["no-pci", "empty-bus", "functions"])


@pytest.mark.skipif(not shutil.which("dtc"), reason="dtc is missing: apt-get install device-tree-compiler")
@TREES
def test_dtc_has_no_warning(tmp_path: Path, functions: tuple[VdevSpec, ...] | None) -> None:
    command = ["dtc", "-I", "dtb", "-O", "dts", "-o", "/dev/null", str(_blob(tmp_path, functions))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _dtschema(blob: Path) -> str:
    """What dtschema's core schemas and the bindings beside this file say about a tree."""
    pytest.importorskip("dtschema", reason="dtschema is missing: pip install dtschema")
    tool = Path(sys.executable).parent / "dt-validate"
    command = [str(tool), "-s", str(Path(__file__).parent / "bindings"), str(blob)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


@TREES
def test_dtschema_has_no_complaint(tmp_path: Path, functions: tuple[VdevSpec, ...] | None) -> None:
    assert _dtschema(_blob(tmp_path, functions)) == ""


def test_dtschema_would_complain(tmp_path: Path) -> None:
    blob = _blob(tmp_path)
    blob.write_bytes(blob.read_bytes().replace(b"hvc\0", b"hcv\0"))
    assert "'hcv' is not one of ['hvc', 'smc']" in _dtschema(blob)
