"""What a running VM says about itself (floor 8): every ``status()`` asked at once, with a deadline.

A plugin's ``status()`` is foreign code that may hang, raise, or give what is no JSON. Each one runs on
a thread of its own; who does not answer in time is reported as such and is not asked anew until it
has come back, so that no number of questions piles up threads.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvmcore.engine import Guest
from qvmcore.events import stack_of
from qvmcore.slot import VdevSlot
from qvmcore.types import MachineSpec

log = logging.getLogger("qvm")

#: Seconds all status() methods together may take.
PATIENCE = 1.0
#: Characters of JSON one of them may give.
SIZE_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True)
class Answer:
    """What a ``status()`` gave, as JSON-able values; or ``problem``: why there is nothing."""

    values: dict[str, Any]
    problem: str = ""


class _Question:
    """One call of one ``status()`` on its thread."""

    def __init__(self, name: str, status: Callable[[], Mapping[str, object]]) -> None:
        self.name = name
        self.told = False
        self._status = status
        self._answer: Answer | None = None
        self._thread = threading.Thread(target=self._run, name=f"status-{name}", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether the call still runs."""
        return self._thread.is_alive()

    def answer(self, deadline: float) -> Answer:
        """Wait until ``deadline`` (monotonic seconds) at most."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._answer is not None:
            return self._answer
        if not self.told:
            self.told = True
            log.warning("%s: status() hangs at\n%s", self.name, stack_of(self._thread.ident))
        return Answer({}, f"status() did not return within {PATIENCE:g} s")

    def _run(self) -> None:
        try:
            # JSON and back here, not later: whatever the values do when looked at, they do it here.
            text = json.dumps(dict(self._status()), default=str, allow_nan=False)
            if len(text) > SIZE_LIMIT:
                self._answer = Answer({}, f"status() gave {len(text)} characters, {SIZE_LIMIT} is the limit")
            else:
                self._answer = Answer(json.loads(text))
        except BaseException as error:
            # SystemExit of a plugin would end this thread without a word.
            self._answer = Answer({}, f"status() raised {type(error).__name__}: {error}")


class Inquiry:
    """Asks the guest and the vdevs of one machine. Any thread, several at a time."""

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}
        self._lock = threading.Lock()

    def ask(self, guest: Guest | None, slots: Sequence[VdevSlot]) -> dict[str, Any]:
        """``guest`` and ``vdevs`` of a status report, within PATIENCE seconds."""
        deadline = time.monotonic() + PATIENCE
        asked_guest = self._question("guest", guest.status) if guest is not None else None
        # A vdev may be called "guest", too.
        asked = [(slot, self._question(f"vdev {slot.name}", slot.vdev.status)) for slot in slots]
        counters = asked_guest.answer(deadline) if asked_guest is not None else Answer({})
        return {
            "guest": {"status": counters.values, "problem": counters.problem},
            "vdevs": [_row(slot, question.answer(deadline)) for slot, question in asked],
        }

    def _question(self, name: str, status: Callable[[], Mapping[str, object]]) -> _Question:
        with self._lock:
            question = self._questions.get(name)
            if question is None or not question.pending:
                question = self._questions[name] = _Question(name, status)
            return question


def _row(slot: VdevSlot, answer: Answer) -> dict[str, Any]:
    return {
        "name": slot.name,
        "type": slot.spec.type,
        "fault": slot.faulted,
        "guest_errors": slot.guest_errors,
        "status": answer.values,
        "problem": answer.problem,
    }


def describe(spec: MachineSpec, name: str, engine: str, state: str, uptime: float) -> dict[str, Any]:
    """What a status report says of the machine itself; ``name`` is that of its run directory."""
    return {
        "name": name or spec.name,
        "vm": spec.name,
        "pid": os.getpid(),
        "state": state,
        "engine": engine,
        "board": spec.board,
        "cpus": spec.cpus,
        "ram": sum(each.size for each in spec.memory if not each.rom),
        "uptime": round(uptime, 1),
    }


def status_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """A report as lines of a log."""
    guest = report["guest"]
    yield f"guest: {guest['problem'] or guest['status']}"
    for vdev in report["vdevs"]:
        failed = f" FAILED ({vdev['fault']})" if vdev["fault"] else ""
        yield f"{vdev['name']} ({vdev['type']}){failed}: {vdev['problem'] or vdev['status']}"
