"""A pytest plugin that writes every report as one line of JSON to the rig's second serial port."""

from __future__ import annotations

import json
import os
import threading
import time
import tty

import pytest

#: Where the lines go; the machine outside collects what comes.
PORT = os.environ.get("QVM_RIG_PORT", "/dev/ttyS1")
#: Seconds.
BEAT = 5.0


class Reporter:
    """Lines: ``{"start": id}``, ``{"report": {...}}``, ``{"broken": text}``, ``{"end": exit code}``.

    And ``{"alive": true}`` every :data:`BEAT` seconds: whoever listens knows a machine that stands still from
    a test that takes its time.
    """

    def __init__(self, config: pytest.Config, port: str = PORT) -> None:
        self._config = config
        self._began = time.monotonic()
        self._out = os.open(port, os.O_WRONLY | os.O_NOCTTY)
        if os.isatty(self._out):
            tty.setraw(self._out)
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self.say(alive=True)

    def say(self, **line: object) -> None:
        """Write one line, all of it."""
        data = json.dumps({**line, "time": round(time.monotonic() - self._began, 2)}).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._out, data) :]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.say(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A set-up, a call or a tear-down has ended."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self.say(report=data)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported here."""
        if report.failed:
            self.say(broken=f"{report.nodeid}: {report.longreprtext}")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """All is done."""
        self.say(end=int(exitstatus))


def pytest_configure(config: pytest.Config) -> None:
    """Start reporting."""
    config.pluginmanager.register(Reporter(config), "qvm-rig-reporter")
