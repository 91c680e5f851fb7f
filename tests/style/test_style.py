"""ruff and the strict type check, as tests: one command shows everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))


def check(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff() -> None:
    check("ruff", "check", ".")


def test_types_of_the_core() -> None:
    check("mypy", "qvmcore")


@pytest.mark.parametrize("plugin", PLUGINS)
def test_types_of_a_plugin(plugin: str) -> None:
    check("mypy", f"plugins/{plugin}/qvm_{plugin}")


def test_types_of_the_example() -> None:
    check("mypy", "examples/qvm_hello/qvm_hello.py")


def test_no_machine_path_and_no_registry_is_named() -> None:
    """Nothing in the repository may depend on the machine it was written on."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    forbidden = [
        "/" + "work/",
        "/" + "root/",
        "deb." + "debian.org",
        "pypi" + ".org",
        "files.python" + "hosted",
    ]
    found = [
        f"{name}: {word}"
        for name in listed.stdout.split()
        for word in forbidden
        if word in (ROOT / name).read_text(errors="ignore")
    ]
    assert found == []
