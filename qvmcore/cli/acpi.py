"""``qvm acpi``."""

from __future__ import annotations

from pathlib import Path

import click

from qvmcore.cli.output import print_table
from qvmcore.cli.params import logging_options, vm_files
from qvmcore.cli.state import State
from qvmcore.errors import HostError


@click.command()
@vm_files
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write the tables, one file each; made when it is missing.",
)
@logging_options
@click.pass_obj
def acpi(state: State, files: tuple[Path, ...], overrides: tuple[str, ...], output: Path) -> None:
    """Write the ACPI tables that the guest of a VM file is given.

    dsdt.aml has the devices; the others are .dat files.

    \b
    qvm acpi vm.toml -o tables
    iasl -d tables/dsdt.aml
    """
    from qvmcore.machine import Machine

    tables = Machine.build(state.compose(files, overrides), state.host).acpi()
    rows = []
    for name, (address, content) in tables.named().items():
        path = output / (f"{name}.aml" if name == "dsdt" else f"{name}.dat")
        try:
            output.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise HostError.from_os("write", path, error) from error
        rows.append([path.name, f"{address:#x}", str(len(content))])
    print_table(f"ACPI tables in {output}", ["file", "address", "bytes"], rows)
