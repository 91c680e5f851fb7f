"""The pytest plugin of the clause matrix: with ``--clauses``, a run writes docs/virtio-clauses.md."""

from __future__ import annotations

import os

import pytest

from tests.clauses.rows import DOCUMENT, OUTCOMES, load, outcomes, render


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--clauses``, or QVM_CLAUSES=1 where the command line is not ours."""
    parser.addoption(
        "--clauses",
        action="store_true",
        default=os.environ.get("QVM_CLAUSES") == "1",
        help="write docs/virtio-clauses.md with the outcomes of this run",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that sees every report records; a worker of xdist does not."""
    if config.getoption("--clauses") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ClauseMatrix(), "qvm-clauses")


class ClauseMatrix:
    """Keeps the outcome of every test of this run: the worst of set-up, call and teardown."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called up to three times per test."""
        outcome = "FAILED" if report.failed else report.outcome
        # The phases beside the call pass for a skipped test, too; they only matter when they fail.
        if report.when == "call" or outcome != "passed":
            known = self.tests.get(report.nodeid, "not run")
            self.tests[report.nodeid] = min(known, outcome, key=OUTCOMES.index)

    def pytest_sessionfinish(self) -> None:
        """Write the document, whatever the run came to."""
        chapters = load()
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(render(chapters, outcomes(chapters, self.tests)))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say so."""
        terminalreporter.write_line(f"clause matrix: {DOCUMENT}")
