"""``qvm acpi``: which files it writes, and what it says when it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import importlib_metadata
import pytest

from qvmcore.cli import main
from qvmcore.plugins import PluginHost
from tests.unit.acpifiles import ACPICA, disassemble

PLUGIN = """
from tests.unit.acpifiles import PM, RTC, UART, VIRTIO
from tests.unit.vmfiles import Pl011, Pl061, UartOptions

class Uart(type(UART.vdev)):
    vdev_type = "ser8250"
    Options = UartOptions

class Clock(type(RTC.vdev)):
    vdev_type = "mc146818"

class Power(type(PM.vdev)):
    vdev_type = "acpi-pm"

class Disk(VIRTIO):
    vdev_type = "disk"

def qvm_vdev_types():
    return [Uart, Clock, Power, Disk, Pl011, Pl061]
"""
TYPES = ("ser8250", "mc146818", "acpi-pm", "disk", "pl011", "pl061")

VM = """\
[system]
board = "x86_64-pc"
ram = "64M"
cpus = 2
pci = true
[load]
kernel = "bzImage"
[[vdev]]
type = "disk"
name = "disk0"
loc = 0xc0000000
intr = "ioapic:5"
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run one command in the folder of vm.toml, with vdevs as the boards need them."""
    info = tmp_path / "site" / "qvm_tables-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qvm-tables\nVersion: 1.0\nSummary: tables\n")
    entries = "".join(f"{name} = fake_tables_plugin\n" for name in TYPES)
    (info / "entry_points.txt").write_text(f"[qvm.vdev.v1]\n{entries}")
    (info.parent / "fake_tables_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QVM_DEBUG", raising=False)
    Path("vm.toml").write_text(VM)
    Path("bzImage").write_bytes(b"kernel")

    def call(*args: str) -> tuple[int, str, str]:
        code = main(args, host=PluginHost([importlib_metadata.PathDistribution(info)]))
        said = capsys.readouterr()
        return code, said.out, said.err

    yield call
    sys.modules.pop("fake_tables_plugin", None)


def test_every_table_is_a_file(run: Run, tmp_path: Path) -> None:
    code, out, err = run("acpi", "vm.toml", "-o", "new/tables")
    assert (code, err) == (0, "")
    files = sorted(path.name for path in (tmp_path / "new" / "tables").iterdir())
    assert files == ["apic.dat", "dsdt.aml", "facp.dat", "facs.dat", "mcfg.dat", "rsdp.dat", "xsdt.dat"]
    lines = out.splitlines()
    assert lines[0] == "ACPI tables in new/tables:"
    assert lines[1].split() == ["file", "address", "bytes"]
    assert lines[2].split() == ["rsdp.dat", "0xe0000", "36"]
    assert sorted(line.split()[0] for line in lines[2:]) == files
    # A second time writes the same tables over the first.
    before = (tmp_path / "new" / "tables" / "dsdt.aml").read_bytes()
    assert run("acpi", "vm.toml", "-o", "new/tables")[0] == 0
    assert (tmp_path / "new" / "tables" / "dsdt.aml").read_bytes() == before


@ACPICA
def test_the_tables_describe_the_vm_file(run: Run, tmp_path: Path) -> None:
    assert run("acpi", "vm.toml", "-o", "tables", "--set", "vdev.disk0.loc=0xc0007000")[0] == 0
    text = disassemble((tmp_path / "tables" / "dsdt.aml").read_bytes(), tmp_path, "dsdt")
    assert text.count("Device (C") == 2
    assert "0xC0007000" in text
    assert "LNRO0005" in text


def test_a_place_that_cannot_be_written_is_named(run: Run) -> None:
    Path("file").write_text("")
    code, out, err = run("acpi", "vm.toml", "-o", "file/tables")
    assert (code, out) == (64, "")
    assert err == "qvm: cannot write file/tables/rsdp.dat: Not a directory\n"


def test_where_to_write_must_be_said(run: Run) -> None:
    code, _, err = run("acpi", "vm.toml")
    assert code == 64
    assert "Missing option '-o' / '--output'" in err


def test_a_board_without_acpi_says_what_it_has(run: Run) -> None:
    Path("arm.toml").write_text('[system]\nboard = "arm64-virt"\nram = "64M"\n[load]\nkernel = "bzImage"\n')
    code, _, err = run("acpi", "arm.toml", "-o", "tables")
    assert (code, err) == (64, "qvm: arm64-virt is not described by ACPI; qvm fdt writes its device tree\n")
    code, _, err = run("fdt", "vm.toml", "-o", "vm.dtb")
    assert code == 64
    assert err == "qvm: x86_64-pc is not described by a device tree; qvm acpi writes its ACPI tables\n"
    assert not Path("tables").exists()
    assert not Path("vm.dtb").exists()
