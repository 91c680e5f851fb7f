"""``qvm fdt``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qvmcore.cli.params import logging_options, vm_files
from qvmcore.cli.state import State
from qvmcore.errors import HostError


@click.command()
@vm_files
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="Where to write the blob; - is standard output.",
)
@logging_options
@click.pass_obj
def fdt(state: State, files: tuple[Path, ...], overrides: tuple[str, ...], output: Path | None) -> None:
    """Write the device tree that the guest of a VM file is given.

    The addresses of an initrd are not in it: they are known when the VM starts.

    \b
    qvm fdt vm.toml -o vm.dtb
    qvm fdt vm.toml | dtc -I dtb -O dts
    """
    from qvmcore.machine import Machine

    if output is None and sys.stdout.isatty():
        raise click.UsageError("the blob is binary: name a file with -o, or pipe it into dtc")
    blob = Machine.build(state.compose(files, overrides), state.host).fdt()
    if output is None or str(output) == "-":
        sys.stdout.buffer.write(blob)
        sys.stdout.buffer.flush()
        return
    try:
        output.write_bytes(blob)
    except OSError as error:
        raise HostError.from_os("write", output, error) from error
