"""``qvm doctor``."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import qvmcore
from qvmcore.cli.output import print_json, print_table
from qvmcore.cli.params import as_json, logging_options
from qvmcore.cli.state import State
from qvmcore.errors import HostError
from qvmcore.options import format_size

if TYPE_CHECKING:
    from qvmcore.plugins import PluginHost

_MEMINFO = Path("/proc/meminfo")


@click.command()
@as_json
@logging_options
@click.pass_obj
def doctor(state: State, json_output: bool) -> int:
    """Say what this machine can run: engines, boards, packages, plugins; and how to repair the rest.

    Every plugin is imported; no guest is started. Exit code 64: no board's guests can run here.

    \b
    qvm doctor
    qvm doctor --json | jq '.engines[] | select(.problem != "")'
    """
    findings = _examine(state.host)
    if json_output:
        print_json(findings)
    else:
        _show(findings)
    return 0 if any(board["engine"] for board in findings["boards"]) else 64


def _examine(host: PluginHost) -> dict[str, Any]:
    """Everything found, as JSON-able values; sizes in bytes."""
    from qvmcore import boards, rundir

    machines = [boards.get(name) for name in boards.names()]
    engines = [row for arch in sorted({board.arch for board in machines}) for row in _engines(host, arch)]
    try:
        rundir.running()
        run_problem = ""
    except HostError as error:
        run_problem = str(error)
    return {
        "qvm": qvmcore.__version__,
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory": _memory(),
        "run_directory": {"path": str(rundir.base()), "problem": run_problem},
        "engines": engines,
        "boards": [
            {
                "board": board.name,
                "arch": board.arch,
                "engine": next(
                    (e["engine"] for e in engines if e["arch"] == board.arch and not e["problem"]), None
                ),
            }
            for board in machines
        ],
        "packages": _packages(),
        "plugins": _plugins(host),
    }


def _engines(host: PluginHost, arch: str) -> list[dict[str, Any]]:
    """Each engine for one architecture, in the order ``engine = "auto"`` prefers them."""
    from qvmcore.choose import DISTRIBUTIONS, survey

    rows: list[dict[str, Any]] = [
        {
            "engine": each.name,
            "arch": arch,
            "native": each.native,
            "package": each.origin,
            "problem": each.problem,
        }
        for each in survey(host, arch)
    ]
    known = {row["engine"] for row in rows}
    return rows + [
        {
            "engine": name,
            "arch": arch,
            "native": None,
            "package": package,
            "problem": f"not installed; pip install {package}",
        }
        for name, package in DISTRIBUTIONS.items()
        if name not in known
    ]


def _plugins(host: PluginHost) -> list[dict[str, str]]:
    """Every plugin with its problem, if it has one."""
    fields = ("kind", "name", "distribution", "version", "problem")
    return [{field: getattr(row, field) for field in fields} for row in host.catalogue(load=True)]


def _packages() -> list[dict[str, str]]:
    """What the core needs, with the versions found; an empty version is a missing package."""
    import importlib_metadata

    try:
        required: Iterable[str] = importlib_metadata.requires("qvmcore") or ()
    except importlib_metadata.PackageNotFoundError:
        required = ()  # run from its sources, without an installation
    rows = []
    for line in required:
        wanted, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", wanted)
        if name is None or "extra" in marker:
            continue
        try:
            version = importlib_metadata.version(name[0])
        except importlib_metadata.PackageNotFoundError:
            version = ""
        rows.append({"package": name[0], "version": version, "wanted": wanted.strip()})
    return rows


def _memory() -> dict[str, int]:
    """Bytes of host memory in all, and what new programs can have; empty when nobody tells."""
    try:
        text = _MEMINFO.read_text()
    except OSError:
        return {}
    sizes = {name: int(size) << 10 for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
    return {
        key: sizes[name]
        for key, name in (("total", "MemTotal"), ("available", "MemAvailable"))
        if name in sizes
    }


def _show(findings: dict[str, Any]) -> None:
    click.echo(f"qvm {findings['qvm']}, Python {findings['python']}, {findings['host']}")
    memory = findings["memory"]
    if "available" in memory and "total" in memory:
        mib = {name: format_size(size >> 20 << 20) for name, size in memory.items()}
        click.echo(f"Memory: {mib['available']} of {mib['total']} available")
    where = findings["run_directory"]
    click.echo(f"Run directory: {where['path']}: {where['problem'] or 'ok'}\n")
    engines = [
        [
            row["engine"],
            row["arch"],
            row["package"],
            row["problem"] or ("ok, native" if row["native"] else "ok"),
        ]
        for row in findings["engines"]
    ]
    print_table("Engines", ["engine", "guests", "package", "state"], engines)
    boards = [[row["board"], row["arch"], row["engine"] or "none"] for row in findings["boards"]]
    print_table("Boards", ["board", "guests", 'engine = "auto"'], boards)
    packages = [
        [row["package"], row["version"] or f"MISSING: {row['wanted']}"] for row in findings["packages"]
    ]
    print_table("Packages", ["package", "version"], packages)
    broken = [
        [row["kind"], row["name"], f"{row['distribution']} {row['version']}", row["problem"]]
        for row in findings["plugins"]
        if row["problem"]
    ]
    print_table("Plugins that cannot be used", ["kind", "name", "package", "why"], broken)
