"""docs/how-a-guest-ends.md: the tests it names exist, its phases and exit codes are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from qvmcore.machine import VCPU_STOP_TIMEOUT
from qvmcore.termination import Phase
from qvmcore.types import Reason

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-a-guest-ends.md").read_text()
TESTS = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)


def table(title: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    part = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_tests_it_names_exist() -> None:
    assert len(TESTS) >= 20
    for path, name in TESTS:
        tree = ast.parse((ROOT / path).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in names, f"{path} has no {name}"


def test_each_requirement_has_a_test() -> None:
    rows = table("Where this comes from")
    assert [row[0] for row in rows[:7]] == [f"Q{number}" for number in range(1, 8)]
    for row in rows[:7]:
        assert "::" in row[-1], f"{row[0]} is met by no test"


def test_the_phases_drawn_are_those_of_the_plan() -> None:
    drawing = PAGE.split("```text\n", 1)[1].split("```", 1)[0]
    assert re.findall(r"^ ([A-Z_]{5,}) ", drawing, re.MULTILINE) == [phase.name for phase in Phase]
    assert f"at most {VCPU_STOP_TIMEOUT:g} s" in drawing


def test_every_exit_code_of_an_end_is_in_the_table() -> None:
    codes = {int(number) for row in table("The ends") for number in re.findall(r"\b\d+\b", row[2])}
    assert {reason.exit_code for reason in Reason} - {Reason.NOT_QUIET.exit_code} <= codes
    assert f"the exit code is {Reason.NOT_QUIET.exit_code} when" in PAGE


def test_files_it_names_exist() -> None:
    for path in re.findall(r"`((?:tests|plugins)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
