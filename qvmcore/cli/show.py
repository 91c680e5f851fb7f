"""``qvm show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qvmcore.cli.output import print_json, print_table
from qvmcore.cli.params import as_json, logging_options, vm_files
from qvmcore.cli.state import State
from qvmcore.options import format_size

if TYPE_CHECKING:
    from qvmcore.layout import MemoryRow
    from qvmcore.pci_tree import PciRow


@click.command()
@vm_files
@as_json
@logging_options
@click.pass_obj
def show(state: State, files: tuple[Path, ...], overrides: tuple[str, ...], json_output: bool) -> None:
    """Show the machine of a VM file: memory map, interrupt map, PCI bus, vdevs with their packages.

    \b
    qvm show vm.toml
    qvm show vm.toml --json | jq '.vdevs[].name'
    """
    machine = _describe(state, files, overrides)
    if json_output:
        print_json(machine)
        return
    click.echo(f"{machine['name']}: {machine['board']}, {machine['cpus']} CPU, engine {machine['engine']}\n")
    memory = [
        [f"{row['start']:#x}", f"{row['end'] - 1:#x}", format_size(row["size"]), row["kind"], row["owner"]]
        for row in machine["memory"]
    ]
    print_table("Memory map", ["first", "last", "size", "kind", "owner"], memory)
    if machine["ports"]:
        ports = [
            [f"{row['start']:#x}", f"{row['end'] - 1:#x}", row["kind"], row["owner"]]
            for row in machine["ports"]
        ]
        print_table("I/O ports", ["first", "last", "kind", "owner"], ports)
    interrupts = [[row["intr"], row["trigger"], row["owner"]] for row in machine["interrupts"]]
    print_table("Interrupt map", ["interrupt", "trigger", "vdev"], interrupts)
    if machine["pci"]:
        functions = [
            [row["address"], row["ids"], row["class"], row["subsystem"], ", ".join(row["bars"]), row["owner"]]
            for row in machine["pci"]
        ]
        print_table("PCI bus 0", ["address", "ids", "class", "subsystem", "BARs", "vdev"], functions)
    vdevs = [
        [
            row["name"],
            row["type"],
            row["pci"] or _place(row),
            row["intr"] or "",
            f"{row['distribution']} {row['version']}",
            "the board" if row["implicit"] else row["source"],
        ]
        for row in machine["vdevs"]
    ]
    print_table("Vdevs", ["name", "type", "loc", "intr", "package", "from"], vdevs)


def _place(row: dict[str, Any]) -> str:
    """``loc`` as a VM file writes it."""
    if row["loc"] is None:
        return ""
    return ("io:" if row["space"] == "io" else "") + f"{row['loc']:#x}"


def _describe(state: State, files: tuple[Path, ...], overrides: tuple[str, ...]) -> dict[str, Any]:
    """The machine as JSON-able values; addresses and sizes in bytes."""
    from qvmcore import boards
    from qvmcore.layout import layout
    from qvmcore.pci_tree import pci_tree

    spec = state.compose(files, overrides)
    entries = state.host.vdev_types()
    classes = {vdev.type: state.host.vdev_class(vdev.type) for vdev in spec.vdevs}
    machine = layout(spec, boards.get(spec.board), classes)
    load = spec.load
    return {
        "name": spec.name,
        "board": spec.board,
        "engine": spec.engine,
        "cpus": spec.cpus,
        "load": {
            "kernel": str(load.kernel) if load.kernel else None,
            "initrd": str(load.initrd) if load.initrd else None,
            "cmdline": load.cmdline,
        },
        "memory": [_range(row) for row in machine.memory],
        "ports": [_range(row) for row in machine.ports],
        "interrupts": [
            {"intr": str(row.intr), "trigger": row.trigger, "owner": row.owner} for row in machine.interrupts
        ],
        "pci": [_function(row) for row in pci_tree(spec, classes)],
        "vdevs": [
            {
                "name": vdev.name,
                "type": vdev.type,
                "loc": vdev.loc,
                "space": vdev.space,
                "pci": str(vdev.pci) if vdev.pci else None,
                "intr": str(vdev.intr) if vdev.intr else None,
                "on_fault": vdev.on_fault,
                "implicit": vdev.implicit,
                "distribution": entries[vdev.type].distribution if vdev.type in entries else "",
                "version": entries[vdev.type].version if vdev.type in entries else "",
                "source": f"{vdev.source.file}:{vdev.source.line}",
            }
            for vdev in spec.vdevs
        ],
    }


def _range(row: MemoryRow) -> dict[str, Any]:
    """A range of memory or of ports."""
    return {"start": row.start, "end": row.end, "size": row.size, "kind": row.kind, "owner": row.owner}


def _function(row: PciRow) -> dict[str, Any]:
    """One PCI function as lspci would name it; what only the start decides is a question mark."""
    who, code = row.identity, row.class_code
    return {
        "address": str(row.address),
        "ids": f"{who.vendor:04x}:{who.device:04x}" if who else "?",
        "class": "/".join(f"{code >> shift & 0xFF:02x}" for shift in (16, 8, 0)) if code is not None else "?",
        "subsystem": f"{who.subsystem_vendor:04x}:{who.subsystem:04x}" if who else "?",
        "bars": [str(bar) for bar in row.bars],
        "owner": row.owner,
    }
