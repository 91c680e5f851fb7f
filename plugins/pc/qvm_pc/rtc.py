"""The MC146818 itself: clock, alarm, periodic rate and 114 bytes of memory, without ports and timers.

The time of day is the host's clock plus an offset, computed when it is read; setting it changes the
offset. Nothing ticks: what has happened since the last look is worked out at the next one, and
``due`` says when the next interrupt can be, for the owner's timer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from qvm_pc.calendar import Alarm, decode, encode

# Registers. Alarm bytes lie between the first of the time of day.
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D = 10, 11, 12, 13
#: Where a PC keeps the century: a byte of the memory, but counted on here.
CENTURY = 0x32
SIZE = 128
TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

A_UIP, A_DIVIDER, A_RATE = 1 << 7, 7 << 4, 0xF
B_SET, B_PIE, B_AIE, B_UIE, B_SQWE, B_BINARY, B_24H, B_DSE = (1 << bit for bit in range(7, -1, -1))
C_IRQF, C_PF, C_AF, C_UF = 1 << 7, 1 << 6, 1 << 5, 1 << 4
D_VALID = 1 << 7
#: The divider's two settings that hold the clock, and where a second begins when they end.
DIVIDER_RESETS, AFTER_RESET = (6 << 4, 7 << 4), 0.5
#: Seconds before the end of a second during which A_UIP is set: 244 us ahead, 1948 us of update.
UPDATE = 0.002192
#: Periodic interrupts a second at most, whatever the rate selected is.
FASTEST = 1024


class Rtc:
    """The chip. ``clock`` gives seconds since 1970; nothing here blocks or raises."""

    def __init__(self, clock: Callable[[], float], offset: float = 0.0) -> None:
        self._clock = clock
        self._offset = offset
        self._memory = bytearray(SIZE)
        self._memory[A], self._memory[B] = 0x26, B_24H
        #: What the time registers hold while the clock stands, in the order of TIME; else None.
        self._held: list[int] | None = None
        self._flags = 0
        self._second, self._tick = self._position()

    def reset(self) -> None:
        """The RESET pin: no interrupt is enabled or pending. Clock and memory run on a battery."""
        self._memory[B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
        self._second, self._tick = self._position()
        self._flags = 0

    @property
    def interrupt(self) -> bool:
        """The level of IRQ, as of the last look."""
        return bool(self._flags & self._memory[B] & (C_PF | C_AF | C_UF))

    @property
    def now(self) -> float:
        """The time of day, in seconds since 1970; of no meaning while the clock stands."""
        return self._clock() + self._offset

    def read(self, index: int) -> int:
        """The byte at ``index``, 0 to 127. Reading register C clears it."""
        self.look()
        if index in TIME:
            return self._time()[TIME.index(index)]
        if index == A:
            return self._memory[A] | (A_UIP if self._updating() else 0)
        if index == C:
            flags, irq = self._flags, self.interrupt
            self._flags = 0
            return flags | (C_IRQF if irq else 0)
        return D_VALID if index == D else self._memory[index]

    def write(self, index: int, value: int) -> bool:
        """Store a byte at ``index``, 0 to 127. False when it made a time of day that does not exist.

        Such a time is held in the registers while the clock stands, and forgotten when it goes on.
        """
        self.look()
        if index in TIME:
            fields = self._time()
            fields[TIME.index(index)] = value
            return self._keep(fields)
        if index == A:
            return self._run(a=value & ~A_UIP)
        if index == B:
            # With SET the enable of the update interrupt goes away.
            return self._run(b=value & ~B_UIE if value & B_SET else value)
        if index not in (C, D):
            self._memory[index] = value
        return True

    def look(self) -> None:
        """Work out which events have happened since the last look."""
        second, tick = self._position()
        if tick != self._tick:
            self._tick = tick
            self._flags |= C_PF
        if second != self._second:
            before, self._second = self._second, second
            if self._held is None:
                self._flags |= C_UF
                alarm = self._alarm()
                # A host whose clock was set back has no second in between.
                if alarm is not None and alarm.between(min(before, second - 1), second):
                    self._flags |= C_AF

    def due(self) -> float | None:
        """Seconds until something that is enabled can interrupt; None when nothing can, or one waits."""
        enabled = self._memory[B]
        if self.interrupt:
            return None
        waits = []
        period = self._period()
        if enabled & B_PIE and period:
            waits.append(max(period - self.now % period, 1 / FASTEST))
        if enabled & (B_AIE | B_UIE) and self._held is None:
            waits.append(1.0 - self.now % 1.0)
        return min(waits, default=None)

    # -- inside --------------------------------------------------------------------------------

    def _format(self) -> dict[str, bool]:
        b = self._memory[B]
        return {"binary": bool(b & B_BINARY), "hours24": bool(b & B_24H)}

    def _time(self) -> list[int]:
        """The time registers, in the order of TIME."""
        return list(self._held) if self._held is not None else encode(math.floor(self.now), **self._format())

    def _keep(self, fields: list[int]) -> bool:
        """Take new time registers: hold them, or let the clock go on from them."""
        if self._held is not None:
            self._held = fields
            return True
        seconds = decode(fields, **self._format())
        if seconds is None:
            return False
        self._offset += seconds - math.floor(self.now)
        self._second, self._tick = self._position()
        return True

    def _run(self, a: int | None = None, b: int | None = None) -> bool:
        """Change registers A and B, which may stop the clock or let it go on."""
        fields = self._time()
        was_reset = self._memory[A] & A_DIVIDER in DIVIDER_RESETS
        self._memory[A] = self._memory[A] if a is None else a
        self._memory[B] = self._memory[B] if b is None else b
        reset = self._memory[A] & A_DIVIDER in DIVIDER_RESETS
        good = True
        if reset or self._memory[B] & B_SET:
            self._held = fields if self._held is None else self._held
        elif self._held is not None:
            self._held = None
            good = self._keep(fields)
        if was_reset and not reset:
            self._offset += AFTER_RESET - self.now % 1.0
        self._second, self._tick = self._position()
        return good

    def _updating(self) -> bool:
        return self._held is None and self.now % 1.0 >= 1.0 - UPDATE

    def _alarm(self) -> Alarm | None:
        raw = [self._memory[index] for index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)]
        return Alarm.of(raw, **self._format())

    def _period(self) -> float:
        """Seconds between periodic events; 0 for none."""
        rate = self._memory[A] & A_RATE
        if not rate or self._memory[A] & A_DIVIDER in DIVIDER_RESETS:
            return 0.0
        # Rates 1 and 2 are those of 8 and 9 with the oscillator of 32768 Hz.
        return (1 << (rate + 7 if rate < 3 else rate) - 1) / 32768

    def _position(self) -> tuple[int, int]:
        """Which second, and which period, it is."""
        now, period = self.now, self._period()
        return math.floor(now), math.floor(now / period) if period else 0
