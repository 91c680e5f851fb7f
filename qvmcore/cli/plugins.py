"""``qvm plugins``."""

from __future__ import annotations

import click

from qvmcore.cli.output import print_json, print_table
from qvmcore.cli.params import as_json, logging_options
from qvmcore.cli.state import State


@click.command()
@click.option("--load", is_flag=True, help="Import every plugin and report those that cannot be used.")
@as_json
@logging_options
@click.pass_obj
def plugins(state: State, load: bool, json_output: bool) -> int:
    """List the installed plugins: vdevs, engines and commands with their packages.

    Reads package metadata only, unless --load is given. Exit code 64: a plugin cannot be used.

    \b
    qvm plugins
    qvm plugins --load
    """
    rows = state.host.catalogue(load=load)
    if json_output:
        fields = ("kind", "name", "distribution", "version", "summary", "problem")
        print_json([{name: getattr(row, name) for name in fields} for row in rows])
    else:
        lines = [[row.kind, row.name, row.distribution, row.version, row.problem or "ok"] for row in rows]
        print_table("Plugins", ["kind", "name", "package", "version", "state"], lines)
    return 64 if any(row.problem for row in rows) else 0
