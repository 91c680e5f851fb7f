"""``qvm serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from qvmcore.cli.params import logging_options, state_of, vm_files
from qvmcore.errors import PluginError
from qvmcore.types import Reason


class _Serve(click.Command):
    """Has an option for each installed server: ``--vhost-user DIR``."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and those of the servers."""
        return [*super().get_params(ctx), *_server_options(ctx)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but a server that is not installed says what to install."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-")
            try:
                state_of(ctx).host.server(name)
            except PluginError as missing:
                if "pip install" in missing.hint:
                    raise click.UsageError(f"no option {error.option_name}; {missing.hint}", ctx) from None
            raise


def _parameter(server: str) -> str:
    return f"server_{server.replace('-', '_')}"


def _server_options(ctx: click.Context) -> list[click.Parameter]:
    return [
        click.Option(
            [f"--{name}", _parameter(name)],
            metavar="DIR",
            type=click.Path(file_okay=False),
            help=f"Serve over {name}, at sockets DIR/NAME.sock.",
        )
        for name in state_of(ctx).host.server_names()
    ]


@click.command(cls=_Serve)
@vm_files
@click.option(
    "--poll",
    metavar="MICROSECONDS",
    type=click.IntRange(0, 1000),
    default=0,
    help="Look for more that long before a thread sleeps: faster answers for a processor's time.",
)
@logging_options
@click.pass_context
def serve(
    ctx: click.Context, /, files: tuple[Path, ...], overrides: tuple[str, ...], poll: int, **folders: Any
) -> int:
    """Serve the vdevs of FILE to guests of another VMM: QEMU, Cloud Hypervisor, User Mode Linux, DPDK.

    Board, memory and kernel of FILE mean nothing here and may be missing. Every vdev that the protocol
    can carry gets a socket; how to attach each one is printed. A client counts as a guest: when it
    leaves, the vdev ends as at the end of a VM, and the next client finds a new one.

    \b
    qvm serve vm.toml --vhost-user /run/vdevs     virtio devices
    qvm serve vm.toml --vfio-user /run/vdevs      any device, as a PCI function

    \b
    SIGTERM, SIGINT (Ctrl-C)   end
    SIGUSR1                    log the state of every vdev

    \b
    Exit code  0  ended as asked           8  a vdev could not be proven quiet
              64  could not start         65  wrong VM file
    """
    from qvmcore.service import Service

    state = state_of(ctx)
    chosen = {
        name: folder
        for name in state.host.server_names()
        if (folder := folders.get(_parameter(name))) is not None
    }
    if len(chosen) != 1:
        known = " or ".join(f"--{name} DIR" for name in state.host.server_names())
        if not known:
            raise PluginError("no server is installed", hint="pip install qvm-vhost-user qvm-vfio-user")
        wrong = "say over which protocol" if not chosen else "serve over one protocol at a time"
        raise click.UsageError(f"{wrong}: {known}", ctx)
    ((name, folder),) = chosen.items()
    if not folder:
        # A shell's unset variable; the working directory would be a surprise.
        raise click.UsageError(f"--{name}: DIR is empty", ctx)
    spec = state.compose(files, overrides, guest=False)
    service = Service(spec, state.host, state.host.server(name), Path(folder), poll / 1e6)

    def ready() -> None:
        state.started = True
        try:
            _tell(service)
            sys.stdout.flush()
        except BrokenPipeError:
            # Nobody reads it (`| head -1`): the vdevs are served all the same.
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())

    return 0 if service.run(ready) else Reason.NOT_QUIET.exit_code


def _tell(service: Any) -> None:
    for vdev, path, lines in service.served:
        click.echo(f"{vdev.name} ({vdev.type}) at {path}")
        for vmm, line in lines:
            click.echo(f"  {vmm}:")
            click.echo(f"    {line}")
