"""The ARM generic timer: the virtual and the physical channel of one CPU.

The counter itself is the core's (host CLOCK_MONOTONIC at 62.5 MHz); Unicorn has no code behind the
compare and control registers, so they live here. Times are nanoseconds of CLOCK_MONOTONIC, counts
are ticks of 16 ns. Registers are accessed on the vCPU thread, ``expire`` on any: one lock per timer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FREQUENCY = 62_500_000
_NS_PER_TICK = 1_000_000_000 // FREQUENCY
_U64 = (1 << 64) - 1
#: A deadline so far away that it means never (about 146 years; fits a signed 64-bit count of ns).
NEVER = 1 << 62

CTL_ENABLE, CTL_IMASK, CTL_ISTATUS = 1, 2, 4

VIRTUAL_PPI, PHYSICAL_PPI = 27, 30


def now_ns() -> int:
    """The host clock the counter is made of, in nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class TimerChannel:
    """One compare register and its output line (level: high while the condition holds, unmasked)."""

    def __init__(
        self, line: Callable[[bool], None], moved: Callable[[], None], clock: Callable[[], int] = now_ns
    ) -> None:
        self._line = line
        self._moved = moved
        self._clock = clock
        self._lock = threading.Lock()
        self._control = 0
        self._compare = 0
        #: When the output has to be looked at next, in ns; NEVER when no wake-up is needed.
        self.deadline = NEVER

    def read_control(self) -> int:
        """CTL with ISTATUS as of now."""
        met = self._control & CTL_ENABLE and self._clock() // _NS_PER_TICK >= self._compare
        return self._control | (CTL_ISTATUS if met else 0)

    def write_control(self, value: int) -> None:
        """ENABLE and IMASK; ISTATUS is read-only."""
        with self._lock:
            self._control = value & (CTL_ENABLE | CTL_IMASK)
            self._evaluate()
        self._moved()

    def read_compare(self) -> int:
        """CVAL in ticks."""
        return self._compare

    def write_compare(self, value: int) -> None:
        """CVAL in ticks."""
        with self._lock:
            self._compare = value & _U64
            self._evaluate()
        self._moved()

    def read_value(self) -> int:
        """TVAL: ticks until the compare value, as an unsigned 32-bit number."""
        return (self._compare - self._clock() // _NS_PER_TICK) & 0xFFFF_FFFF

    def write_value(self, value: int) -> None:
        """TVAL: a signed 32-bit distance from now."""
        distance = (value & 0xFFFF_FFFF ^ 0x8000_0000) - 0x8000_0000
        self.write_compare(self._clock() // _NS_PER_TICK + distance)

    def expire(self, now: int) -> None:
        """Raise the output when the deadline has passed; any thread."""
        if now >= self.deadline:
            with self._lock:
                self._evaluate()

    def _evaluate(self) -> None:
        due = self._compare * _NS_PER_TICK
        met = False
        self.deadline = NEVER
        if self._control & CTL_ENABLE:
            met = self._clock() >= due
            if not met and not self._control & CTL_IMASK and due < NEVER:
                self.deadline = due
        self._line(met and not self._control & CTL_IMASK)
