"""The tutorial of plugins/virtio_entropy: every snippet is executed, in its order, in a fresh environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.docs.snippets import blocks, environment, run

PLUGIN = Path(__file__).resolve().parents[2] / "plugins" / "virtio_entropy"
TUTORIAL = (PLUGIN / "README.md").read_text()
BLOCKS = blocks(TUTORIAL)


def test_every_snippet_runs_in_order(tmp_path: Path) -> None:
    project = tmp_path / "project"
    printed = run(BLOCKS, project, environment(tmp_path / "venv"), PLUGIN / "README.md")
    assert "max_bytes" in printed and " passed" in printed
    python = str(tmp_path / "venv" / "bin" / "python")
    where = [python, "-c", "import qvm_virtio_entropy; print(qvm_virtio_entropy.__file__)"]
    used = subprocess.run(where, capture_output=True, text=True, check=True).stdout
    assert str(project) in used, "the package of the tutorial was used, not the installed one"


def test_the_files_shown_are_the_files_shipped() -> None:
    shown = {name: text for name, _, text in BLOCKS if name}
    assert set(shown) == {
        "qvm_virtio_entropy/__init__.py", "pyproject.toml", "tests/test_conformance.py", "vm.toml",
    }  # fmt: skip
    for name, text in shown.items():
        if name != "vm.toml":
            assert (PLUGIN / name).read_text() == text, name


def test_it_is_short() -> None:
    assert len((PLUGIN / "qvm_virtio_entropy" / "__init__.py").read_text().splitlines()) <= 60
    assert len((PLUGIN / "tests" / "test_conformance.py").read_text().splitlines()) <= 30
