"""The clause matrix cannot rot: rows are complete, the tests they name exist, the document is theirs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clauses.matrix import ClauseMatrix
from tests.clauses.rows import (
    DOCUMENT,
    ROOT,
    Chapter,
    Clause,
    Section,
    is_named,
    load,
    outcomes,
    problems,
    recorded,
    render,
)

CHAPTERS = load()


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Every test there is, whatever this run selects, as node ids without parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}


def test_rows_are_complete_and_well_formed() -> None:
    assert list(problems(CHAPTERS)) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.title)
def test_every_test_named_exists(chapter: Chapter, collected: set[str]) -> None:
    absent = [
        f"{row.id}: {name}"
        for row in chapter.rows
        for name in row.tests
        if not any(is_named(name, node) for node in collected)
    ]
    assert absent == []


def test_the_document_is_what_the_rows_give(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--clauses"):
        pytest.skip("this run writes the document (--clauses)")
    text = DOCUMENT.read_text()
    current = render(CHAPTERS, recorded(text)) == text
    assert current, f"{DOCUMENT} is older than its rows: run ./bootstrap test --clauses"


# ---- the machinery ---------------------------------------------------------------------------------

ROW = Clause("9.1/1", "MUST", "Be kind.", ("test_kind",))
SAMPLE = [Chapter("Sample", (Section("9.1", "Kindness", 1, (ROW,)),))]


@pytest.mark.parametrize(
    ("tests", "outcome"),
    [
        ({}, "not run"),
        ({"a.py::test_kind": "passed"}, "passed"),
        ({"a.py::test_kind[1]": "passed", "a.py::TestX::test_kind[2]": "FAILED"}, "FAILED"),
        ({"a.py::test_kind[1]": "passed", "a.py::test_kind[2]": "skipped"}, "passed"),
        ({"a.py::test_kind": "skipped"}, "skipped"),
        ({"a.py::test_kinder": "passed", "a.py::not_test_kind": "passed"}, "not run"),
    ],
)
def test_the_outcome_of_a_row(tests: dict[str, str], outcome: str) -> None:
    results = outcomes(SAMPLE, tests)
    assert results == {"9.1/1": outcome}
    text = render(SAMPLE, results)
    assert recorded(text) == results
    assert text.endswith(f"| **{outcome}** |\n" if outcome == "FAILED" else f"| {outcome} |\n")


def test_a_row_of_two_tests_needs_both() -> None:
    row = Clause("9.1/1", "MUST", "Be kind.", ("test_one", "b.py::test_two"))
    both = [Chapter("Sample", (Section("9.1", "Kindness", 1, (row,)),))]
    one, other = {"x/b.py::test_one": "passed"}, {"x/c.py::test_two": "passed"}
    assert outcomes(both, one | other) == {"9.1/1": "not run"}
    assert outcomes(both, one | {"x/b.py::test_two": "passed"}) == {"9.1/1": "passed"}


def test_what_is_not_covered_is_said() -> None:
    rows = (
        Clause("9.1/1", "MUST", "Be kind.", note="nobody looked"),
        Clause("9.1/2", "MUST NOT", "Lie.", note="mute", applies=False),
    )
    other = Section("9.2", "Flying", 7, note="no wings")
    text = render([Chapter("Sample", (Section("9.1", "Kindness", 2, rows), other))], {})
    assert "| 9.1/1 | MUST | Be kind. |  | **not covered**: nobody looked |\n" in text
    assert "| 9.1/2 | MUST NOT | Lie. |  | not applicable: mute |\n" in text
    assert "7 clauses, not applicable: no wings" in text
    assert "| Sample | 9 | 0 | 0 | 0 | 0 | 1 | 8 |" in text


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (Section("9.1", "Kindness", 2, (ROW,)), "9.1: rows"),
        (Section("9.1", "Kindness", 1, (ROW,), note="none"), "9.1: rows"),
        (Section("9.1", "Kindness", 1, (Clause("9.1/1", "SHOULD", "Smile."),)), "kind is 'SHOULD'"),
        (Section("9.1", "Kindness", 1, (Clause("9.1/1", "MUST", ""),)), "says nothing"),
        (
            Section("9.1", "Kindness", 1, (Clause("9.1/1", "MUST", "Fly.", applies=False),)),
            "nothing says why",
        ),
    ],
)
def test_a_malformed_row_is_told(section: Section, said: str) -> None:
    (problem,) = problems([Chapter("Sample", (section,))])
    assert said in problem


def test_a_run_with_clauses_records_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_not_here(): pytest.skip('absent')\n"
        "@pytest.fixture\ndef broken(): yield; assert 0\n"
        "def test_bad_end(broken): pass\n"
    )
    matrix = ClauseMatrix()
    monkeypatch.setattr(matrix, "pytest_sessionfinish", lambda: None)
    pytest.main(["-q", "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)], plugins=[matrix])
    capsys.readouterr()
    names = {node.partition("::")[2]: outcome for node, outcome in matrix.tests.items()}
    wanted = {"test_good": "passed", "test_bad": "FAILED", "test_not_here": "skipped"}
    assert names == {**wanted, "test_bad_end": "FAILED"}
