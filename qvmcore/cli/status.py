"""``qvm status``."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from qvmcore.cli.output import print_json, print_table
from qvmcore.cli.params import as_json, logging_options
from qvmcore.errors import HostError, QvmError
from qvmcore.options import format_size

if TYPE_CHECKING:
    from qvmcore.rundir import RunningVm

#: VMs asked at the same time.
_AT_ONCE = 8
_COLUMNS = ["name", "pid", "state", "engine", "board", "cpus", "ram", "uptime"]


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from qvmcore import rundir

    try:
        return [CompletionItem(vm.name) for vm in rundir.running() if vm.name.startswith(incomplete)]
    except HostError:
        return []


@click.command()
@click.argument("name", required=False, shell_complete=_complete)
@as_json
@logging_options
def status(name: str | None, json_output: bool) -> None:
    """List your running VMs, or show the counters and the state of every vdev of one.

    NAME is a name of the list, or a process number. Of several VMs of one name the second is NAME.2.
    Exit code 64: there is no such VM, or it does not answer.

    \b
    qvm status
    qvm status first
    qvm status first --json | jq '.vdevs[] | select(.fault != "")'
    """
    from qvmcore import control, rundir

    if name is None:
        _list(rundir.running(), json_output)
        return
    report = control.ask(control.find(name))
    if json_output:
        print_json(report)
        return
    try:
        _show(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HostError(
            f"{name} answers in another way than this qvm expects ({type(error).__name__}: {error})",
            hint="it may run another version of qvm; --json shows its answer as it is",
        ) from error


def _list(vms: Sequence[RunningVm], json_output: bool) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reports = list(pool.map(_short, vms))
    if json_output:
        print_json(reports)
        return
    rows = [[_cell(row[column]) for column in _COLUMNS] for row in _people(reports)]
    print_table("Running VMs", _COLUMNS, rows)
    for report in reports:
        if report["problem"]:
            click.echo(_cell(report["problem"]))


def _short(vm: RunningVm) -> dict[str, Any]:
    """The line of one VM; ``problem`` when it gives no answer."""
    from qvmcore import control

    row: dict[str, Any] = {"name": vm.name, "pid": vm.pid, "problem": ""}
    try:
        report = control.ask(vm)
    except QvmError as error:
        return row | dict.fromkeys(_COLUMNS[2:]) | {"state": "no answer", "problem": str(error)}
    return row | {column: report.get(column) for column in _COLUMNS[2:]}


def _people(reports: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for report in reports:
        ram, uptime = report["ram"], report["uptime"]
        yield {
            **report,
            # What `qvm serve` serves has no machine of its own.
            "cpus": report["cpus"] if report.get("board") else "",
            "ram": format_size(ram) if isinstance(ram, int) and ram else "",
            "uptime": _duration(uptime) if isinstance(uptime, int | float) else "",
        }


def _show(report: Mapping[str, Any]) -> None:
    """A whole report as tables. Raises what a report of another shape leads to."""
    (row,) = _people([report])
    where = f"over {_cell(row['engine'])}"
    if row["board"]:
        where = f"{_cell(row['board'])}, engine {_cell(row['engine'])}, {row['cpus']} CPU, {row['ram']}"
    name, state = _cell(row["name"]), _cell(row["state"])
    click.echo(f"{name}: {state}, {where}, pid {row['pid']}, up {row['uptime']}\n")
    guest = report["guest"]
    if guest["problem"]:
        click.echo(f"Guest: {_cell(guest['problem'])}")
    else:
        print_table("Guest", ["counter", "value"], [list(item) for item in _flat(guest["status"])])
    vdevs = report["vdevs"]
    states = [
        [_cell(vdev["name"]), _cell(vdev["type"]), _state(vdev), str(vdev["guest_errors"])] for vdev in vdevs
    ]
    print_table("Vdevs", ["name", "type", "state", "guest errors"], states)
    items = [[_cell(vdev["name"]), key, value] for vdev in vdevs for key, value in _flat(vdev["status"])]
    if items:
        print_table("Status of the vdevs", ["vdev", "item", "value"], items)


def _state(vdev: Mapping[str, Any]) -> str:
    if vdev["fault"]:
        return _cell(f"FAILED: {vdev['fault']}")
    return _cell(vdev["problem"] or "ok")


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as ``outer.inner``, a list of them as ``outer.0.inner``."""
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(each, dict) for each in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _cell(f"{prefix}{key}"), _cell(value)


def _cell(value: object) -> str:
    """For a terminal: what a guest can put into a status must not control the terminal."""
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))
