"""Time as a dependency, so that a poll of a minute is tested in a millisecond."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds, and waiting."""

    #: Whether several threads may wait at once; False for a clock that stands still meanwhile.
    threads: bool

    def now(self) -> float:
        """Seconds since some moment."""

    def sleep(self, seconds: float) -> None:
        """Let the calling thread wait."""


class RealClock:
    """The host's own."""

    threads = True

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)
