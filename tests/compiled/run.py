"""Python with the compiled build of this working copy: ``python -m tests.compiled.run WORDS``.

The words are Python's own: ``tests/bench/ring.py``, or ``-m pytest tests/unit/test_virtio_split.py``. They
are run in a copy of the working copy that is removed afterwards. The extensions of the wheels, built anew as
README says (half a minute), lie beside their sources there, and an import finds them first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWITCH = "HATCH_BUILD_HOOK_ENABLE_MYPYC"


def projects() -> dict[str, list[str]]:
    """Folder, as written from the root, of each distribution with compiled modules -> their names."""
    found = {}
    for file in (ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))):
        wheel = tomllib.loads(file.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        hook = wheel.get("hooks", {}).get("mypyc")
        if hook is not None:
            names = [path.strip("/").removesuffix(".py").replace("/", ".") for path in hook["include"]]
            found[str(file.parent.relative_to(ROOT))] = names
    return found


def lacking() -> str:
    """What this machine lacks for the build; empty when there is all."""
    if shutil.which("gcc") is None:
        return "no gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h"
    return ""


def build(folder: Path) -> None:
    """Make ``folder`` the copy with the extensions. Raises subprocess.CalledProcessError."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"), dirs_exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        for project in projects():
            out = Path(wheels, project)
            command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT / project]
            subprocess.run(
                command,
                check=True,
                env={**os.environ, SWITCH: "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            (wheel,) = out.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                extensions = [name for name in archive.namelist() if name.endswith(".so")]
                archive.extractall(folder / project, extensions)


def environment(folder: Path) -> dict[str, str]:
    """What Python needs to take all of ours from that copy."""
    paths = [folder, *folder.glob("plugins/*"), *folder.glob("examples/*")]
    # What pytest was told for this run says nothing about that one.
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
    return {**others, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def main(words: list[str]) -> int:
    """The exit status of that Python."""
    why = lacking()
    if why:
        print(f"run: {why}; apt-get install gcc libc6-dev python3-dev", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="qvm-compiled-") as name:
        folder = Path(name)
        try:
            build(folder)
        except subprocess.CalledProcessError as error:
            print(error.stdout, error, sep="\n", file=sys.stderr)
            return 1
        return subprocess.call([sys.executable, *words], cwd=folder, env=environment(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
