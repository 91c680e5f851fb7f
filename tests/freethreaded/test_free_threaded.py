"""Suites of ours under a Python without a GIL, where threads meet that a GIL keeps apart.

Which suites: those with threads of their own, and short. All others run the same way:
``QVM_FREE_THREADED="tests/unit plugins/quiesce" pytest tests/freethreaded``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.freethreaded import build, installed

ROOT = Path(__file__).resolve().parents[2]
SUITES = {
    "core": (
        "tests/unit/test_memory_threads.py", "tests/unit/test_events.py", "tests/unit/test_virtio_remote.py",
        "tests/unit/test_machine.py",
    ),
    "virtio-blk": ("plugins/virtio_blk/tests/test_queues.py",),
    "virtio-console": ("plugins/virtio_console",),
    "quiesce": ("plugins/quiesce/tests/test_lifeline.py",),
    "pass": ("plugins/pass/tests/test_pass.py",),
}  # fmt: skip
if "QVM_FREE_THREADED" in os.environ:
    SUITES = {"chosen": tuple(os.environ["QVM_FREE_THREADED"].split())}
#: Seconds for one of them.
PATIENCE = 280


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A free-threaded Python with all that our tests need."""
    found = build.built()
    if found is None:
        own = [name for name in ("python3.14t", "python3.13t") if shutil.which(name)]
        why = f"{own[0]} is there, without what qvm needs" if own else "there is no free-threaded Python"
        pytest.skip(f"{why}; four minutes make one: {build.COMMAND}")
    return installed.install(found, tmp_path_factory.mktemp("freethreaded") / "venv")


@pytest.mark.parametrize("suite", SUITES)
def test_suites_hold_without_a_GIL(python: Path, suite: str) -> None:
    # What was collected for this run says nothing about that one.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))
    }
    inside = ROOT / "tests" / "freethreaded" / "inside.py"
    ran = subprocess.run(
        [str(python), str(inside), "-q", "-p", "no:cacheprovider", *SUITES[suite]],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert ran.returncode == 0, ran.stdout[-8000:]
    assert "GIL off" in ran.stdout
    assert " passed" in ran.stdout
