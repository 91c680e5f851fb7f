"""Machines with ACPI tables for the tests, and the tools of ACPICA that judge the tables."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from qvmcore.acpi import AcpiTables
from qvmcore.acpi.image import build_acpi
from qvmcore.boards import DescribedVdev
from qvmcore.boards.x86_64_pc import X86Pc
from qvmcore.types import IntrSpec, LoadSpec, MachineSpec, PciAddress, Trigger, VdevSpec, Window
from qvmcore.vdev import Vdev

ACPICA = pytest.mark.skipif(
    not (shutil.which("iasl") and shutil.which("acpiexec")),
    reason="iasl and acpiexec are missing: apt-get install acpica-tools",
)


def line(number: int) -> IntrSpec:
    return IntrSpec("ioapic", number)


def kind(
    hid: str, *sizes: int, irqs: int = 1, trigger: Trigger = Trigger.EDGE, where: str = "mem"
) -> type[Vdev]:
    """A vdev class with these windows."""

    class Kind(Vdev):
        vdev_type = "kind"
        acpi_hid = hid
        windows = tuple(Window(size) for size in sizes)
        space = where

    Kind.irqs, Kind.trigger = irqs, trigger
    return Kind


def described(spec: VdevSpec, cls: type[Vdev]) -> DescribedVdev:
    """Building tables uses neither the context nor the options of a vdev."""
    return DescribedVdev(spec, cls(None, None))  # type: ignore[arg-type]


UART = described(
    VdevSpec("ser8250", "uart0", None, 0x3F8, line(4), space="io"), kind("PNP0501", 8, where="io")
)
RTC = described(VdevSpec("mc146818", "rtc0", None, 0x70, line(8), space="io"), kind("PNP0B00", 2, where="io"))
PM = described(
    VdevSpec("acpi-pm", "pm0", None, 0x600, line(9), space="io"),
    kind("", 16, trigger=Trigger.LEVEL, where="io"),
)
FIXED = (UART, RTC, PM)

VIRTIO = kind("LNRO0005", 0x200, trigger=Trigger.LEVEL)
DIRECT = (
    described(VdevSpec("disk", "disk0", None, 0xC000_0000, line(5)), VIRTIO),
    described(VdevSpec("net", "net0", None, 0xC000_1000, line(6)), VIRTIO),
    described(
        VdevSpec("far", "far0", None, 0x20_0000_0000, line(10)), kind("QVM0001", 0x200, 0x1000, irqs=2)
    ),
    described(VdevSpec("wide", "wide0", None, 0x1000, None, space="io"), kind("QVMX0002", 0x200, irqs=0)),
    described(VdevSpec("quiet", "quiet0", None, 0xC000_2000, line(7)), kind("", 0x1000)),
)


def function(device: int, number: int = 0, intr: IntrSpec | None = None) -> DescribedVdev:
    """A vdev on PCI."""
    spec = VdevSpec("disk", f"p{device}{number}", intr=intr, pci=PciAddress(device, number))
    return described(spec, VIRTIO)


PCI = (function(1), function(6), function(6, 1, line(11)), function(31))


def tables_of(
    vdevs: Iterable[DescribedVdev] = FIXED, *, cpus: int = 1, pci: bool = False
) -> dict[str, tuple[int, bytes]]:
    """The tables of a machine by name."""
    return image_of(vdevs, cpus=cpus, pci=pci).named()


def image_of(vdevs: Iterable[DescribedVdev] = FIXED, *, cpus: int = 1, pci: bool = False) -> AcpiTables:
    """The tables of a machine."""
    each = tuple(vdevs)
    specs = tuple(one.spec for one in each)
    spec = MachineSpec("vm", "x86_64-pc", "auto", cpus, (), LoadSpec(), specs, pci=pci)
    return build_acpi(spec, each, X86Pc())


def disassemble(blob: bytes, folder: Path, name: str) -> str:
    """What ``iasl -d`` makes of a table; it must have nothing to complain about."""
    path = folder / f"{name}.aml"
    path.write_bytes(blob)
    said = run_tool(folder, "iasl", "-d", path.name)
    assert "decoded" in said or "Disassembly completed" in said, said
    return (folder / f"{name}.dsl").read_text()


def recompile(folder: Path, name: str) -> bytes:
    """The table that iasl makes of its own disassembly, without optimising it."""
    said = run_tool(folder, "iasl", "-oa", "-p", f"{name}-again", f"{name}.dsl")
    assert re.search(r"Compilation successful\. 0 Errors, 0 Warnings, 0 Remarks", said), said
    return (folder / f"{name}-again.aml").read_bytes()


def execute(folder: Path, blob: bytes, *commands: str) -> str:
    """Load a DSDT into ACPICA's interpreter and give its debugger these commands."""
    (folder / "dsdt.aml").write_bytes(blob)
    said = run_tool(folder, "acpiexec", "-b", "; ".join(commands), "dsdt.aml")
    assert "1 ACPI AML tables successfully acquired and loaded" in said, said
    return said


def run_tool(folder: Path, *command: str) -> str:
    """Both outputs of a tool that must succeed without a complaint."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert [each for each in _COMPLAINT.findall(said) if not _OWN_FAULT.search(each)] == [], said
    return said


_COMPLAINT = re.compile(
    r"^.*(?:ACPI (?:BIOS )?(?:Error|Warning)|Warning +\d+|Error +\d+|Incorrect ).*$", re.MULTILINE
)
#: The command "execute predefined" of acpiexec gives _OSC two numbers where buffers belong.
_OWN_FAULT = re.compile(r"_OSC: Argument #[14] type mismatch - Found \[Integer\]")
