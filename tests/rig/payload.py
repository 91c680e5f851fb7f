"""What goes into the rig's machine besides Debian: the working tree, what it imports, and the guest.

Made afresh for each session as a folder and from that a read-only disk; the machine mounts it as
``/code``. Files keep their place in the repository, so a test has one name inside and outside.
"""

from __future__ import annotations

import compileall
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement

from qvmcore.api import HostError

ROOT = Path(__file__).resolve().parents[2]
#: Distributions of the repository that the rig has no use for: no guest is built there.
LEFT_OUT = frozenset({"qvm-guests"})
RUNNER = ("pytest", "pytest-timeout")
#: Files of others that no program reads when it runs; unicorn's static library has 32 MiB.
_FOR_COMPILERS = frozenset({".a", ".h"})
#: In a line of entry_points.txt; the groups of pytest would pull what only unit tests need.
_OURS = "qvm."
_CONFIGURATION = """[pytest]
addopts =
    -ra --color=no --strict-markers --import-mode=importlib
    -p tests.rig.inside.reporter -p pytest_timeout -p no:cacheprovider
pythonpath = .
filterwarnings = error
timeout = {timeout}
"""


def projects(root: Path = ROOT) -> list[tuple[Path, dict[str, Any]]]:
    """The repository's distributions as (folder, [project] table and what the wheel holds)."""
    files = [root / "pyproject.toml", *sorted(root.glob("plugins/*/pyproject.toml"))]
    files += sorted(root.glob("examples/*/pyproject.toml"))
    loaded = [(path.parent, tomllib.loads(path.read_text())) for path in files]
    return [(folder, table) for folder, table in loaded if table["project"]["name"] not in LEFT_OUT]


def install(folder: Path, table: dict[str, Any], site: Path) -> None:
    """Copy the code of one distribution of the repository, with the metadata that finds its plugins."""
    project = table["project"]
    wheel = table["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in [*wheel.get("packages", ()), *wheel.get("include", ()), *wheel.get("only-include", ())]:
        source = folder / name
        if source.is_dir():
            shutil.copytree(source, site / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, site / name)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Summary: {project.get('description', '')}"]
    lines += [f"Requires-Dist: {text}" for text in project.get("dependencies", ())]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    groups = {name: points for name, points in project.get("entry-points", {}).items() if _OURS in name}
    text = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    )
    (info / "entry_points.txt").write_text(text)


def third_party(tables: Iterable[dict[str, Any]]) -> dict[str, metadata.Distribution]:
    """What the distributions and the test runner need, all of it, out of the running environment."""
    waiting = [Requirement(name) for name in RUNNER]
    ours = {table["project"]["name"] for table in tables} | LEFT_OUT
    for table in tables:
        waiting += [Requirement(text) for text in table["project"].get("dependencies", ())]
    # A kernel of Debian may be compressed with it.
    waiting += [Requirement("zstandard")] if sys.version_info < (3, 14) else []
    found: dict[str, metadata.Distribution] = {}
    while waiting:
        need = waiting.pop()
        name = need.name.lower().replace("_", "-")
        if name in ours or name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = metadata.distribution(need.name)
        except metadata.PackageNotFoundError:
            raise HostError(
                f"the rig needs the Python package {need.name}", hint="./bootstrap test"
            ) from None
        waiting += [Requirement(text) for text in found[name].requires or ()]
    return found


def copy_distribution(dist: metadata.Distribution, site: Path) -> None:
    """Copy what an installed distribution runs on, without its commands."""
    for file in dist.files or ():
        outside = ".." in file.parts or PurePosixPath(file).is_absolute()
        if outside or file.suffix in _FOR_COMPILERS:
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = Path(str(dist.locate_file(file)))
        if source.exists():
            shutil.copy2(source, target)


def compiled(dist: metadata.Distribution) -> bool:
    """Whether it has modules of machine code, which fit one version of Python only."""
    return any(file.suffix == ".so" for file in dist.files or ())


def fetch(dists: Sequence[metadata.Distribution], site: Path, python: tuple[int, int]) -> None:
    """Wheels of the same versions for the Python in the machine, by pip. Raises HostError."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    command += ["--target", str(site), "--only-binary", ":all:", "--platform", "manylinux2014_x86_64"]
    command += ["--python-version", f"{python[0]}.{python[1]}", "--implementation", "cp"]
    done = subprocess.run(
        [*command, *(f"{dist.name}=={dist.version}" for dist in dists)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HostError(f"pip cannot get the rig's Python packages: {done.stderr.strip()[-300:]}")


def choose(tree: Path, tests: Sequence[str], environment: Mapping[str, str], timeout: int) -> None:
    """Write down which tests (node ids) run, with which environment, and the limit of one in seconds."""
    (tree / "pytest.ini").write_text(_CONFIGURATION.format(timeout=timeout))
    (tree / "run.json").write_text(json.dumps({"tests": list(tests), "environment": dict(environment)}))


def assemble(tree: Path, guest: Path, python: tuple[int, int]) -> None:
    """Fill ``tree``: code, what it depends on, and the guest that ``qvm guest build`` made."""
    tree.chmod(0o755)
    site = tree / "site"
    site.mkdir()
    owned = projects()
    for folder, table in owned:
        install(folder, table, site)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests/rig/inside", tree / "tests/rig/inside", ignore=ignore)
    (tree / "tests/guest").mkdir()
    shutil.copy2(ROOT / "tests/guest/conftest.py", tree / "tests/guest")  # what watches a `qvm run`
    if python == sys.version_info[:2]:
        # In the machine this would take a minute. The files of others come with their compiled form.
        compileall.compile_dir(tree, quiet=1, stripdir=str(tree), prependdir="/code", workers=1)
    dists = third_party([table for _, table in owned]).values()
    fits = [dist for dist in dists if python == sys.version_info[:2] or not compiled(dist)]
    for dist in fits:
        copy_distribution(dist, site)
    if others := [dist for dist in dists if dist not in fits]:
        fetch(others, site, python)
    for name in ("vmlinuz", "initramfs.cpio.gz"):
        (tree / "guest").mkdir(exist_ok=True)
        shutil.copy2(guest / name, tree / "guest" / name)
