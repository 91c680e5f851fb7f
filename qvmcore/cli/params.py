"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from qvmcore.cli.state import State, set_up_logging
from qvmcore.errors import HostError

_Command = TypeVar("_Command", bound=Callable[..., Any])


def vm_files(command: _Command) -> _Command:
    """``FILE...`` and ``--set KEY=VALUE``."""
    files = click.argument(
        "files",
        metavar="FILE...",
        nargs=-1,
        required=True,
        # Whether it exists is checked with the rest of the VM, so that all problems come at once.
        type=click.Path(path_type=Path),
    )
    overrides = click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        help="Override a key: system.ram=1G, load.cmdline=..., vdev.NAME.hostdev=... Repeatable.",
    )
    return files(overrides(command))


def as_json(command: _Command) -> _Command:
    """``--json``."""
    return click.option("--json", "json_output", is_flag=True, help="Print JSON for programs.")(command)


def logging_options(command: _Command) -> _Command:
    """``--verbose``, ``--quiet``, ``--log-file`` and ``--debug``; before or behind the command's name."""
    options = [
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_remember, help="Say more."
        ),
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            expose_value=False,
            callback=_remember,
            help="Warnings and errors only.",
        ),
        click.option(
            "--log-file",
            metavar="FILE",
            type=click.Path(dir_okay=False),
            expose_value=False,
            callback=_remember,
            help="Write every message with its time to FILE as well.",
        ),
        click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=_debug,
            help="Show tracebacks (also: QVM_DEBUG=1).",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def complete_vdev_types(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The installed vdev types."""
    entries = state_of(ctx).host.vdev_types()
    return [CompletionItem(n, help=e.origin) for n, e in entries.items() if n.startswith(incomplete)]


def complete_engines(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The installed engines."""
    names: Sequence[str] = ["auto", *state_of(ctx).host.engine_names()]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def state_of(ctx: click.Context) -> State:
    """What the commands of this invocation share; completion runs without any."""
    return ctx.find_object(State) or State()


def _remember(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if not value or ctx.resilient_parsing:
        return
    given = ctx.find_root().meta
    given[f"qvm.{param.name}"] = value
    verbosity = 1 if given.get("qvm.verbose") else -1 if given.get("qvm.quiet") else 0
    log_file = given.get("qvm.log_file")
    try:
        set_up_logging(verbosity, log_file)
    except OSError as error:
        raise HostError.from_os("write the log file", log_file, error) from error


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    state = ctx.find_object(State)
    if value and state is not None:
        state.debug = True
