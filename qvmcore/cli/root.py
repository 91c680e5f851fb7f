"""The group ``qvm``: its own commands by name, and those that plugins bring, each loaded when used."""

from __future__ import annotations

import importlib

import click

import qvmcore
from qvmcore.cli.params import logging_options
from qvmcore.cli.state import State, set_up_logging
from qvmcore.errors import PluginError, nearest

#: Name -> module of qvmcore.cli that holds the command, as an attribute of the same name.
_OWN = {
    "run": "run",
    "serve": "serve",
    "status": "status",
    "check": "check",
    "show": "show",
    "plugins": "plugins",
    "vdev": "vdev",
    "fdt": "fdt",
    "acpi": "acpi",
    "doctor": "doctor",
    "completion": "completion",
}


class _Commands(click.Group):
    """Commands are imported one by one; listing them imports no plugin."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands first, then those of plugins."""
        plugin = [name for name in _state(ctx).host.command_names() if name not in _OWN]
        return [*_OWN, *plugin]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None. A plugin's command that cannot be used raises PluginError."""
        if cmd_name in _OWN:
            module = importlib.import_module(f"qvmcore.cli.{_OWN[cmd_name]}")
            own: click.Command = getattr(module, cmd_name)
            return own
        host = _state(ctx).host
        return host.command(cmd_name) if cmd_name in host.command_names() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown name says what comes near, or what to install."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            hint = nearest(name, self.list_commands(ctx))
            if not hint:
                try:
                    _state(ctx).host.command(name)
                except PluginError as error:
                    hint = error.hint
            raise click.UsageError(f"no such command {name!r}" + (f"; {hint}" if hint else ""), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Own commands with their help; for a plugin's, the summary of its distribution."""
        own = []
        for name in _OWN:
            command = self.get_command(ctx, name)
            if command is not None:
                own.append((name, command.get_short_help_str(90)))
        with formatter.section("Commands"):
            formatter.write_dl(own)
        plugins = [
            (name, f"NOT USABLE: {entry.problem}" if entry.problem else entry.summary or entry.origin)
            for name, entry in _state(ctx).host.command_names().items()
            if name not in _OWN
        ]
        if plugins:
            with formatter.section("Commands of plugins"):
                formatter.write_dl(plugins)


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=_Commands, context_settings=_SETTINGS)
@click.version_option(qvmcore.__version__, prog_name="qvm", message="%(prog)s %(version)s")
@logging_options
def qvm() -> None:
    """Virtual machines whose every device is a pip-installed plugin.

    \b
    qvm run vm.toml                         start a VM
    qvm run vm.toml --set system.ram=1G     ... with another memory size
    qvm serve vm.toml --vhost-user DIR      give its vdevs to another VMM
    qvm check vm.toml                       find every mistake in a VM file
    qvm show vm.toml                        memory map, interrupts, vdevs
    qvm vdev virtio-blk                     options of a vdev type
    qvm status                              running VMs
    qvm doctor                              what this machine can run, and why not the rest

    Exit codes: 0 done, 64 wrong use or cannot start, 65 wrong VM file, 96 failed while running.
    """
    context = click.get_current_context()
    if not any(key.startswith("qvm.") for key in context.find_root().meta):
        set_up_logging(0, None)


def _state(ctx: click.Context) -> State:
    return ctx.ensure_object(State)
