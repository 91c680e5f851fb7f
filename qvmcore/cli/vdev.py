"""``qvm vdev``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from qvmcore.cli.output import print_json, print_table
from qvmcore.cli.params import as_json, complete_vdev_types, logging_options
from qvmcore.cli.state import State
from qvmcore.errors import PluginError

if TYPE_CHECKING:
    from qvmcore.options import OptionInfo


@click.command()
@click.argument("vdev_type", metavar="[TYPE]", required=False, shell_complete=complete_vdev_types)
@as_json
@logging_options
@click.pass_obj
def vdev(state: State, vdev_type: str | None, json_output: bool) -> None:
    """List the vdev types, or show what a [[vdev]] table of TYPE may say.

    \b
    qvm vdev
    qvm vdev virtio-blk
    """
    if vdev_type is None:
        _list_types(state, json_output)
    else:
        _show_type(state, vdev_type, json_output)


def _list_types(state: State, json_output: bool) -> None:
    rows = []
    for name, entry in state.host.vdev_types().items():
        try:
            summary = state.host.vdev_class(name).summary
        except PluginError as error:
            summary = f"NOT USABLE: {error.message}"
        row = {"type": name, "distribution": entry.distribution, "version": entry.version, "summary": summary}
        rows.append(row)
    if json_output:
        print_json(rows)
    else:
        lines = [[row["type"], f"{row['distribution']} {row['version']}", row["summary"]] for row in rows]
        print_table("Vdev types", ["type", "package", "summary"], lines)


def _show_type(state: State, vdev_type: str, json_output: bool) -> None:
    from qvmcore.compose.tables import VdevTable
    from qvmcore.options import describe_options

    cls = state.host.vdev_class(vdev_type)
    entry = state.host.vdev_types()[vdev_type]
    common = [option for option in describe_options(VdevTable) if option.name != "type"]
    options = describe_options(cls.Options)
    if json_output:
        print_json(
            {
                "type": vdev_type,
                "distribution": entry.distribution,
                "version": entry.version,
                "summary": cls.summary,
                "windows": [window.size for window in cls.windows],
                "interrupts": cls.irqs,
                "options": [dataclasses.asdict(option) for option in options],
                "common": [dataclasses.asdict(option) for option in common],
            }
        )
        return
    click.echo(f"{vdev_type} ({entry.distribution} {entry.version}): {cls.summary}\n")
    columns = ["key", "value", "default", "meaning"]
    print_table("Options", columns, [_line(option) for option in options])
    print_table("Keys of every vdev", columns, [_line(option) for option in common])


def _line(option: OptionInfo) -> list[str]:
    default = "required" if option.required else option.default_text
    return [option.name, option.type_text, default, option.help]
