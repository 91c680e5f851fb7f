"""The orderly end of a VM (floor 3): a plan of isolated callbacks, run once, phase by phase.

``TerminationPlan.run`` is called from one place for every end that can be caught. Phases run in
the order of danger: DMA stops before interrupts, both before threads end, data is flushed before
anything is released. Within a phase callbacks run at the same time, each on a thread of its own
with its own deadline, so neither an exception nor a hang of one delays another one's quiesce.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvmcore.errors import QvmError
from qvmcore.events import stack_of
from qvmcore.types import GuestEnd

log = logging.getLogger(__name__)


class Phase(enum.IntEnum):
    """The phases in the order they run; all callbacks of one end, or time out, before the next."""

    STOP_DMA = 10
    MASK_IRQ = 20
    STOP_WORKERS = 30
    FLUSH = 40
    RELEASE = 50


@dataclass(frozen=True, slots=True)
class TerminationCallback:
    """One step of the end.

    ``run(end)`` must be idempotent and bounded by itself; it runs on a thread of its own.
    ``deadline`` is in seconds; a callback that exceeds it is abandoned and reported with its stack.
    ``quiets`` are the names of the vdevs whose physical devices it quiesces: unless it ends well, the
    exit code of the VM is 8. It raises :class:`~qvmcore.errors.NotQuiet` when one is not proven quiet.
    """

    name: str
    phase: Phase
    run: Callable[[GuestEnd], None]
    deadline: float = 1.0
    quiets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of one callback: ``verdict`` is ``ok``, ``failed`` or ``late``."""

    name: str
    phase: Phase
    verdict: str
    seconds: float
    detail: str = ""
    quiets: tuple[str, ...] = ()


class _Step:
    """A callback on its own thread."""

    def __init__(self, callback: TerminationCallback, end: GuestEnd) -> None:
        self.callback = callback
        self._end = end
        self._error = ""
        self._took = 0.0
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"end-{callback.name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            # The host gives no more threads: better without a deadline than not at all.
            self._run()

    def _run(self) -> None:
        try:
            self.callback.run(self._end)
        except BaseException as error:
            # The one place where a termination callback is isolated: whatever it raises is its
            # own failure and is reported; SystemExit must not end the plan either.
            known = isinstance(error, QvmError)
            self._error = str(error) if known else "".join(traceback.format_exception(error)).strip()
        finally:
            self._took = time.monotonic() - self._started

    def result(self) -> StepResult:
        """Wait until the callback's deadline and say what became of it."""
        callback = self.callback
        if self._thread.ident is not None:
            self._thread.join(max(0.0, self._started + callback.deadline - time.monotonic()))
        if self._thread.is_alive():
            stack = stack_of(self._thread.ident)
            return StepResult(
                callback.name, callback.phase, "late", callback.deadline, stack, callback.quiets
            )
        verdict = "failed" if self._error else "ok"
        return StepResult(callback.name, callback.phase, verdict, self._took, self._error, callback.quiets)


class TerminationPlan:
    """Every termination callback of a VM, collected before the first guest instruction."""

    def __init__(self) -> None:
        self._callbacks: list[TerminationCallback] = []
        self._lock = threading.Lock()
        self._results: tuple[StepResult, ...] | None = None
        self._started = False
        self._done = threading.Event()

    def add(self, callback: TerminationCallback) -> None:
        """Add a step. Raises ValueError once the plan has started to run."""
        with self._lock:
            if self._started:
                raise ValueError(f"{callback.name}: the termination plan is already running")
            self._callbacks.append(callback)

    @property
    def callbacks(self) -> Sequence[TerminationCallback]:
        """The steps in the order they were added."""
        return tuple(self._callbacks)

    def run(self, end: GuestEnd) -> tuple[StepResult, ...]:
        """Run every phase once; a second caller waits for the first run and gets its results."""
        with self._lock:
            first, self._started = not self._started, True
        if not first:
            self._done.wait()
            return self._results or ()
        results: list[StepResult] = []
        for phase in Phase:
            # Reverse creation order: what was built last depends on what was built before.
            steps = [_Step(c, end) for c in reversed(self._callbacks) if c.phase is phase]
            results += [step.result() for step in steps]
        for result in results:
            _report(result)
        self._results = tuple(results)
        self._done.set()
        return self._results


def _report(result: StepResult) -> None:
    name = f"{result.name} ({result.phase.name})"
    if result.verdict == "ok":
        log.debug("end: %s: ok in %.3f s", name, result.seconds)
    elif result.verdict == "late":
        log.error("end: %s: did not finish within %.3g s; it was at\n%s", name, result.seconds, result.detail)
    else:
        log.error("end: %s: failed\n%s", name, result.detail)
