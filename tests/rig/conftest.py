"""Tests in the rig: the files in ``inside/`` are collected here and run in the machine.

The machine is started before the first test of the session, with all of them that are selected, and runs
them beside the others; they come last here, and the reports pytest makes there are handed on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from qvm_guests.progress import Progress

from tests.rig import machine
from tests.rig.results import Results, Silence

INSIDE = Path(__file__).parent / "inside"
#: Seconds: for one test in the machine; without any word from it, which says one every few; from its start to
#: its end.
TEST_LIMIT = 420
PATIENCE = 120.0
TOTAL_LIMIT = float(os.environ.get("QVM_RIG_LIMIT", "3600"))
#: How many machines that fell silent are replaced in one session.
SPARE_MACHINES = 4
RIG = pytest.StashKey["Rig"]()


def is_inside(item: pytest.Item) -> bool:
    """Whether a test runs in the machine."""
    return INSIDE in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in the machine come last: it needs the time of all others. Their limits are kept there, and by
    the watch on it; here they only wait."""
    items.sort(key=is_inside)
    for item in items:
        if is_inside(item):
            item.add_marker(pytest.mark.timeout(0))
            item.add_marker("guest")


class Rig:
    """The machine of one session. ``problem`` says why there is none.

    An emulated machine with guests of its own may stand still, or its kernel panic, without any fault of
    what is tested: no program can do that to a kernel, but QEMU's emulation of SVM can (seen with QEMU 7.2).
    Such a machine is replaced before the next test begins here, not beside one: tests count this process's
    descriptors. The new one goes on with the test it was at; when the last of them falls silent, that test
    fails and the rest do.
    """

    def __init__(self, session: pytest.Session) -> None:
        self._machine: machine.Machine | None = None
        self._failed = False
        self._spare = SPARE_MACHINES
        self.problem = ""
        self._wanted = [item.nodeid for item in session.items if is_inside(item)]
        self._lines = Lines(session.config)
        self._began = time.monotonic()
        self._start(self._wanted, self._lines)
        self._results = Results(self, patience=PATIENCE)

    def _start(self, wanted: Sequence[str], progress: Progress) -> None:
        try:
            self._machine = machine.start(wanted, progress, timeout=TEST_LIMIT)
        except machine.UnusableError as error:
            self.problem = str(error)

    def look(self) -> None:
        """Between two tests: replace a machine that fell silent."""
        if self._machine is not None and self._spare and not self.problem and self._results.quiet():
            self._mend()

    def _mend(self) -> bool:
        """Replace a machine that fell silent, if there is one to spare; whether there is a machine."""
        why = self._results.silence()
        left = self._results.left(self._wanted)
        if not why or not left:
            return True
        if not self._spare or self.problem:
            return False
        assert self._machine is not None
        self._spare -= 1
        self._machine.stop()
        self._lines.note(f"{left[0]}: {why}; another machine goes on (log: {self._machine.console})")
        self._start(left, machine.Quiet())
        self._results.renew()
        return not self.problem

    @property
    def results(self) -> Path:
        """The file the machine's lines come to."""
        assert self._machine is not None
        return self._machine.results

    def alive(self) -> bool:
        """Whether the machine runs and has time left."""
        assert self._machine is not None
        return self._machine.alive() and time.monotonic() - self._began < TOTAL_LIMIT

    def reports(self, item: pytest.Item) -> Any:
        """The reports of one test, as they come."""
        if self.problem:
            # Where tests are what is bought, a rig that cannot run is a failure.
            yield from made_up(item, "failed" if os.environ.get("CI") else "skipped", self.problem)
            return
        hook = item.config.hook
        seen = False
        try:
            for data in self._results.of(item.nodeid):
                seen = True
                report = hook.pytest_report_from_serializable(config=item.config, data=data)
                self._failed |= report.failed
                yield report
        except Silence as silence:
            if self._mend():
                yield from self.reports(item)
                return
            assert self._machine is not None
            self._failed = True
            self._machine.stop()
            text = f"{silence}\n--- end of {self._machine.console}\n{self._machine.tail()}"
            yield from made_up(item, "failed", text, when="teardown" if seen else "setup")

    def close(self) -> str:
        """Stop the machine; its log stays when a test failed. Returns where that is."""
        if self._machine is None:
            return ""
        if not self._failed:
            self._machine.close()
            return ""
        self._machine.stop()
        return str(self._machine.folder)


class Lines(Progress):
    """What making and starting the machine says, as lines of pytest's terminal."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__()
        self._config = config

    def note(self, text: str) -> None:
        """One line."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"rig: {text}")


def made_up(item: pytest.Item, outcome: Any, text: str, when: Any = "setup") -> Any:
    """Reports for a test that did not run."""
    location = (str(item.path), item.location[1] or 0, text)
    keywords: Any = dict.fromkeys(item.keywords, 1)
    longrepr: Any = location if outcome == "skipped" else text
    yield pytest.TestReport(item.nodeid, item.location, keywords, outcome, longrepr, when)
    if when == "setup":
        yield pytest.TestReport(item.nodeid, item.location, keywords, "passed", None, "teardown")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the machine, which is then busy for many minutes with one processor."""
    if not session.config.option.collectonly and any(map(is_inside, session.items)):
        session.stash[RIG] = Rig(session)


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Instead of running a test of the machine here: take its reports from there."""
    stash = item.session.stash
    if not is_inside(item):
        if RIG in stash:
            stash[RIG].look()
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[RIG].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The machine does not outlive the session."""
    if RIG in session.stash and (folder := session.stash[RIG].close()):
        Lines(session.config).note(f"logs of the machine with the failed test: {folder}")
