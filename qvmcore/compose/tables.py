"""The tables of a VM file as typed structs (floor 8): which keys there are, and their defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from qvmcore.compose.sources import Problems, Table
from qvmcore.options import Address, HostPath, OptionProblem, Size, convert_options
from qvmcore.types import IntrSpec

#: Names end up in run directories, sockets and ``--set vdev.NAME.key``.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_:+-]{0,63}")

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class SystemTable(msgspec.Struct, frozen=True, rename="kebab"):
    """``[system]``: the machine as a whole."""

    board: Annotated[str, msgspec.Meta(description="which board, e.g. arm64-virt")] = ""
    name: Annotated[str, msgspec.Meta(description="name of the VM; default: name of the file")] = ""
    engine: Annotated[str, msgspec.Meta(description="what runs the guest")] = "auto"
    ram: Annotated[Size | None, msgspec.Meta(description="size of guest memory")] = None
    cpus: Annotated[int, msgspec.Meta(ge=1, description="number of vCPUs")] = 1
    unsupported: Annotated[
        Literal["ignore", "abort"],
        msgspec.Meta(description="what an access to nothing does: reads give all ones, or the VM ends"),
    ] = "ignore"
    pci: Annotated[
        bool, msgspec.Meta(description="a PCI bus even without a vdev on it; with one it is always there")
    ] = False
    shutdown_timeout: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="seconds from power button to power cut")
    ] = 10.0
    dump: Annotated[
        HostPath | None, msgspec.Meta(description="directory of guest dumps: on SIGUSR2, and of a crash")
    ] = None


class SafetyTable(msgspec.Struct, frozen=True, rename="kebab"):
    """``[safety]``: what the machine must have before it may start."""

    require_quiesce: Annotated[
        bool,
        msgspec.Meta(description="refuse to start unless somebody quiesces every passed-through device"),
    ] = False


class LoadTable(msgspec.Struct, frozen=True, rename="kebab"):
    """``[load]``: what is placed into guest memory."""

    kernel: Annotated[HostPath | None, msgspec.Meta(description="Linux Image, bzImage, ELF")] = None
    initrd: Annotated[HostPath | None, msgspec.Meta(description="initial RAM disk")] = None
    # Linux on arm64 and on x86 keeps 2048 bytes, with the final NUL.
    cmdline: Annotated[str, msgspec.Meta(max_length=2047, description="kernel command line")] = ""
    format: Annotated[
        Literal["auto", "linux", "elf", "raw"], msgspec.Meta(description="kind of the kernel file")
    ] = "auto"
    address: Annotated[Address | None, msgspec.Meta(description="where a raw kernel goes")] = None
    mode: Annotated[
        Literal["real16", "protected32", "long64"] | None,
        msgspec.Meta(description="how an x86 CPU starts a raw kernel"),
    ] = None


class MemoryTable(msgspec.Struct, frozen=True, rename="kebab"):
    """``[[ram]]`` or ``[[rom]]``: a range of memory, by default behind the one before."""

    size: Annotated[Size, msgspec.Meta(description="size in bytes")]
    start: Annotated[Address | None, msgspec.Meta(description="first address")] = None


class VdevTable(msgspec.Struct, frozen=True, rename="kebab"):
    """``[[vdev]]``: the keys every vdev has; all others are the vdev's own options."""

    type: Annotated[str, msgspec.Meta(description="what it is; qvm vdev lists the types")] = ""
    name: Annotated[str, msgspec.Meta(description="its name; default: the type and a number")] = ""
    loc: Annotated[
        Address | None,
        msgspec.Meta(description="guest address of its registers, io:PORT, or pci:0:DEVICE[.FUNCTION]"),
    ] = None
    intr: Annotated[IntrSpec | None, msgspec.Meta(description="its interrupt, e.g. gic:41")] = None
    on_fault: Annotated[
        Literal["isolate", "shutdown"],
        msgspec.Meta(description="when the vdev breaks: only the device fails, or the VM ends"),
    ] = "isolate"


#: What QNX's configuration has and this does not, or has elsewhere: (what is wrong, what to do).
QNX_SECTIONS = {
    "pass": ("what is passed through is a vdev here", 'write a [[vdev]] with type = "pass"'),
    "reserve": ("reserving addresses is not built yet", "remove [reserve]"),
}

COMMON_KEYS = VdevTable.__struct_encode_fields__


def read_table(
    cls: type[_Struct], table: Table, where: str, problems: Problems, skip: Iterable[str] = ()
) -> _Struct | None:
    """The struct; bad keys are reported and left at their default. None when a required one is bad."""
    values = table.plain(skip)
    base_dirs = {key: item.base_dir for key, item in table.items.items()}
    result, found = convert_options(cls, values, table.base_dir, base_dirs=base_dirs)
    if found:
        report(found, table, where, problems)
        bad = {problem.key for problem in found}
        good = {key: value for key, value in values.items() if key not in bad}
        result, _ = convert_options(cls, good, table.base_dir, base_dirs=base_dirs)
    typed: _Struct | None = result
    return typed


def report(found: Iterable[OptionProblem], table: Table, where: str, problems: Problems) -> None:
    """Add option problems with the places of their keys."""
    for problem in found:
        problems.add(table.source_of(problem.key), where, problem.message, problem.hint)


def check_name(name: str, table: Table, where: str, problems: Problems) -> None:
    """Names are short and safe in paths."""
    if not _NAME.fullmatch(name):
        message = f"name: expected at most 64 letters, digits and _ : + -, not {name!r}"
        problems.add(table.source_of("name"), where, message)


def section(root: Table, name: str, problems: Problems) -> Table:
    """The table ``[name]``, empty when the file has none."""
    value: Any = root.get(name)
    if isinstance(value, Table):
        return value
    if value is not None:
        problems.add(root.source_of(name), name, f"expected a table: write [{name}]")
    return Table(root.source, root.base_dir)


def array(root: Table, name: str, problems: Problems) -> list[Table]:
    """The tables ``[[name]]``, in order."""
    value: Any = root.get(name)
    if isinstance(value, list) and all(isinstance(item, Table) for item in value):
        return value
    if value is not None:
        hint = 'or write ram = "512M" under [system]' if name == "ram" else ""
        problems.add(root.source_of(name), name, f"expected an array of tables: write [[{name}]]", hint)
    return []
