"""docs/writing-a-vdev.md: every block is executed, and its tables name what there is."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

from qvmcore import api
from qvmcore.termination import Phase
from qvmcore.testing import abuse, conformance, pci
from qvmcore.vdev import Vdev, VdevContext
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.device import VirtioVdev
from tests.docs.snippets import blocks, environment, run

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "docs" / "writing-a-vdev.md"
GUIDE = PATH.read_text()
BLOCKS = blocks(GUIDE)


def test_every_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    monkeypatch.syspath_prepend(str(project))
    try:
        printed = run(BLOCKS, project, environment(tmp_path / "venv"), PATH)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "acme_vdevs"]:
            del sys.modules[name]
    assert "acme-vdevs" in printed, "qvm plugins lists the package"
    assert "faces of the dice" in printed, "qvm vdev shows the help of the options"
    assert " passed" in printed and "failed" not in printed
    assert re.search(r"gic:\d+ +level +bell0", printed), f"the bell has an interrupt:\n{printed}"


def test_code_imports_what_the_version_promises_and_nothing_else() -> None:
    for name, language, text in BLOCKS:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            if module.split(".")[0] == "qvmcore":
                shipped = name and not name.startswith("tests/")
                assert module == "qvmcore.api" or (module.startswith("qvmcore.testing.") and not shipped), (
                    name
                )
            if module == "qvmcore.api":
                assert isinstance(node, ast.ImportFrom)
                assert {each.name for each in node.names} <= set(api.__all__)


def test_the_life_cycle_is_that_of_the_base_class() -> None:
    table = GUIDE.split("| method | when | thread |")[1].split("\n\n")[0]
    first = " ".join(row.split("|")[1] for row in table.strip().splitlines()[1:])
    shown = set(re.findall(r"`(\w+)", first))
    methods = {name for name, value in vars(Vdev).items() if inspect.isfunction(value)}
    assert shown == methods - {"describe_fdt"}


def test_the_virtio_methods_are_those_of_the_base_class() -> None:
    table = GUIDE.split("| method | when | thread |")[2].split("\n\n")[0]
    methods = {name for name, value in vars(VirtioVdev).items() if inspect.isfunction(value)}
    inherited = {"__init__", "on_reset", "describe_fdt", "status"}
    assert set(re.findall(r"`(\w+)\(", table)) == methods - inherited


def test_what_it_says_of_chains_is_there() -> None:
    table = GUIDE.split("| `chain.` | what |")[1].split("\n\n")[0]
    first = " ".join(row.split("|")[1] for row in table.strip().splitlines()[1:])
    named = set(re.findall(r"`(\w+)", first))
    assert named == {name for name in dir(Chain) if not name.startswith("_")} - {"head", "readers", "writers"}


def test_the_powers_are_those_of_the_context() -> None:
    table = GUIDE.split("| `ctx.` | what |")[1].split("\n\n")[0]
    first = " ".join(row.split("|")[1] for row in table.strip().splitlines()[1:])
    shown = set(re.findall(r"`(\w+)", first))
    powers = {name for name in vars(VdevContext) if not name.startswith("_")} | set(
        VdevContext.__annotations__
    )
    assert shown == powers
    assert all(f"`{phase.name}`" in table for phase in Phase)


def test_the_classes_of_the_kit_are_all_listed() -> None:
    table = GUIDE.split("| class | for | you add |")[1].split("\n\n")[0]
    there = {
        name
        for module in (conformance, pci, abuse)
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and name.endswith(("Conformance", "Abuse"))
    }
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == there


def test_files_it_names_exist() -> None:
    for name in re.findall(r"`((?:examples|plugins|docs)/\w+)`", GUIDE):
        assert (ROOT / name).exists(), name
