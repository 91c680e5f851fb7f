"""From the lines of the machine to the reports of pytest, in the order of the tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol


class Silence(Exception):
    """There will be no result for a test; the text says why."""


class Running(Protocol):
    """What is asked of the machine."""

    @property
    def results(self) -> Path:
        """The file its lines come to."""

    def alive(self) -> bool:
        """Whether more lines may come."""


class Results:
    """Reads the lines as they come; any thread. ``patience`` is how long nothing may be heard, in seconds.

    The machine says something every few seconds, whatever its tests do (see ``inside/reporter.py``), so
    silence is the machine's.
    """

    def __init__(self, machine: Running, *, patience: float, clock: Callable[[], float] = time.time) -> None:
        self._machine = machine
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str, list[dict[str, Any]]] = {}
        self._done: set[str] = set()
        self.renew()

    def renew(self) -> None:
        """There is another machine, which begins with the first test that has no result."""
        with self._lock:
            self._offset = 0
            self._broken: list[str] = []
            self._ended = False
            self._began = self._clock()
            for nodeid in self._kept.keys() - self._done:
                del self._kept[nodeid]

    def left(self, wanted: Sequence[str]) -> Sequence[str]:
        """From the first one on that has no result."""
        return wanted[next((n for n, each in enumerate(wanted) if each not in self._done), len(wanted)) :]

    def of(self, nodeid: str, *, pause: float = 0.1) -> Iterator[dict[str, Any]]:
        """The reports of one test, serialised, up to its tear-down. Raises Silence when they do not come."""
        while True:
            why = self.silence()
            with self._lock:
                waiting, self._kept[nodeid] = self._kept.get(nodeid, []), []
            for report in waiting:
                yield report
                if report["when"] == "teardown":
                    return
            if why and not waiting:
                raise Silence(why)
            time.sleep(pause)

    def quiet(self) -> bool:
        """Whether there may be :meth:`silence`. Opens nothing: tests count this process's descriptors."""
        return not self._machine.alive() or self._overdue()

    def silence(self) -> str:
        """Read what has come; why nothing more will, or an empty text."""
        with self._lock:
            # Asked before reading: what a machine wrote before its end is not lost.
            alive = self._machine.alive()
            if self._read():
                return ""
            if not alive or self._ended:
                return self._why("the machine ended without a result of this test")
            if self._overdue():
                return self._why(f"nothing was heard of the machine for {self._patience:g} s")
            return ""

    def _overdue(self) -> bool:
        """By the file's own time: what is read late was not said late."""
        try:
            heard = self._machine.results.stat().st_mtime
        except FileNotFoundError:
            heard = 0.0
        return self._clock() - max(self._began, heard) > self._patience

    def _why(self, text: str) -> str:
        return "\n".join([text, *self._broken])

    def _read(self) -> bool:
        """Take the lines that are complete; whether there were any."""
        try:
            with self._machine.results.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return False
        lines, newline, _ = data.rpartition(b"\n")
        if not newline:
            return False
        self._offset += len(lines) + 1
        for line in lines.splitlines():
            self._take(line)
        return True

    def _take(self, line: bytes) -> None:
        try:
            content = json.loads(line)
        except ValueError:
            self._broken.append(f"not a result: {line[:200]!r}")
            return
        if "report" in content:
            report = content["report"]
            self._kept.setdefault(report["nodeid"], []).append(report)
            if report["when"] == "teardown":
                self._done.add(report["nodeid"])
        elif "broken" in content:
            self._broken.append(content["broken"])
        elif "end" in content:
            self._ended = True
