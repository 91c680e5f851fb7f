"""From the lines of the machine to the reports of pytest, in the order of the tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
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
    """Reads the lines as they come. ``patience`` is how long nothing may be heard, in seconds."""

    def __init__(
        self, machine: Running, *, patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._machine = machine
        self._patience = patience
        self._clock = clock
        self._heard = clock()
        self._offset = 0
        self._broken: list[str] = []
        self._ended = False
        self._kept: dict[str, list[dict[str, Any]]] = {}

    def of(self, nodeid: str, *, pause: float = 0.1) -> Iterator[dict[str, Any]]:
        """The reports of one test, serialised, up to its tear-down. Raises Silence when they do not come."""
        while True:
            waiting = self._kept.setdefault(nodeid, [])
            while waiting:
                report = waiting.pop(0)
                yield report
                if report["when"] == "teardown":
                    return
            # Asked before reading: what a machine wrote before its end is not lost.
            alive = self._machine.alive()
            if self._read():
                self._heard = self._clock()
            elif not alive or self._ended:
                raise Silence(self._why("the machine ended without a result of this test"))
            elif self._clock() - self._heard > self._patience:
                raise Silence(self._why(f"nothing was heard of the machine for {self._patience:g} s"))
            else:
                time.sleep(pause)

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
        elif "broken" in content:
            self._broken.append(content["broken"])
        elif "end" in content:
            self._ended = True
