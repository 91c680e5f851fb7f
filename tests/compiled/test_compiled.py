"""Suites of ours on the compiled build: that of the wheels which README's commands make."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiled import run

ROOT = Path(__file__).resolve().parents[2]
SUITES = {
    "rings": ["tests/unit/test_virtio_*.py"],
    "worker and PCI": ["tests/unit/test_events.py", "tests/unit/test_*pci*.py"],
    "virtio-blk": ["plugins/virtio_blk/tests/test_*.py"],
    "vfio-user": ["plugins/vfio_user/tests/test_*.py"],
    "QEMU": ["tests/foreign/test_qemu_vfio_user.py"],
}
#: Of these only so many: that they hold has little to do with how the code is run.
ONLY = {"vfio-user": "not any_offset_and_size"}
#: Seconds for one of them.
PATIENCE = 280
WHERE = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working copy with the extensions of its wheels."""
    why = run.lacking()
    if why:
        pytest.skip(f"there is {why}, which a compiled build needs")
    folder = tmp_path_factory.mktemp("compiled")
    try:
        run.build(folder)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{error}\n{error.stdout[-8000:]}")
    return folder


def python(copy: Path, *words: str) -> str:
    """What Python says there, when it ends well."""
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env=run.environment(copy),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert ran.returncode == 0, ran.stdout[-8000:]
    return ran.stdout


def test_what_is_to_be_compiled_is_imported_compiled(copy: Path) -> None:
    names = [name for each in run.projects().values() for name in each]
    files = [Path(line) for line in python(copy, "-c", WHERE, *names).splitlines()]
    assert len(files) == len(names) > 0
    assert [file for file in files if file.suffix != ".so" or not file.is_relative_to(copy)] == []


@pytest.mark.parametrize("suite", SUITES)
def test_suites_hold_compiled(copy: Path, suite: str) -> None:
    files = [str(file.relative_to(copy)) for pattern in SUITES[suite] for file in copy.glob(pattern)]
    only = ["-k", ONLY[suite]] if suite in ONLY else []
    said = python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *only, *files)
    assert " passed" in said


def test_no_extension_hides_a_source_of_the_working_copy() -> None:
    # `pip install` with the switch set leaves some there; an edited source would have no effect any more.
    found = [path for folder in ("qvmcore", "plugins") for path in (ROOT / folder).rglob("*.so")]
    assert found == []
