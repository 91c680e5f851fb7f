"""``qvm run``."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from qvmcore.cli.params import complete_engines, logging_options, vm_files
from qvmcore.cli.state import State

log = logging.getLogger("qvm")


@click.command()
@vm_files
@click.option("--engine", metavar="NAME", shell_complete=complete_engines, help="Use this engine.")
@logging_options
@click.pass_obj
def run(state: State, files: tuple[Path, ...], overrides: tuple[str, ...], engine: str | None) -> int:
    """Run the VM that FILE describes, until it ends.

    With several files, later ones override earlier ones.

    \b
    qvm run vm.toml
    qvm run vm.toml site.toml --set system.ram=1G --set vdev.disk0.hostdev=other.img

    \b
    SIGTERM, SIGINT (Ctrl-C)   press the power button; a second one cuts the power
    SIGQUIT                    cut the power at once
    SIGUSR1                    log the state of every vdev
    SIGUSR2                    write a guest dump

    \b
    Exit code  0  the guest powered off or reset
               3  the power was cut     4  watchdog
               5  unsupported access    6  a vdev failed     7  the guest crashed
               8  a physical device could not be proven quiet
              64  could not start      65  wrong VM file    96  failed while running
    """
    from qvmcore.machine import Machine

    if engine is not None:
        overrides = (*overrides, f"system.engine={engine}")
    machine = Machine.build(state.compose(files, overrides), state.host)
    try:
        outcome = machine.run()
    finally:
        state.started = machine.started
    log.info("ended: %s%s", outcome.end.reason, f": {outcome.end.message}" if outcome.end.message else "")
    if not outcome.quiet:
        log.error("ended: not every physical device was proven quiet; see: qvm quiesce status")
    return outcome.code
