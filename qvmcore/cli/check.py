"""``qvm check``."""

from __future__ import annotations

from pathlib import Path

import click

from qvmcore.cli.params import logging_options, vm_files
from qvmcore.cli.state import State
from qvmcore.options import format_size


@click.command()
@vm_files
@logging_options
@click.pass_obj
def check(state: State, files: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Check a VM file and report everything that is wrong with it.

    Nothing is opened or started. Exit code 0: all is well; 65: not.

    \b
    qvm check vm.toml
    """
    from qvmcore.machine import Machine

    spec = state.compose(files, overrides)
    Machine.build(spec, state.host)
    memory = format_size(sum(each.size for each in spec.memory))
    vdevs = ", ".join(f"{vdev.name} ({vdev.type})" for vdev in spec.vdevs)
    click.echo(f"{spec.source.file}: ok: {spec.board}, {spec.cpus} CPU, {memory}, vdevs: {vdevs}")
