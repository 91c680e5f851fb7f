"""vdev ``mc146818``: a PC's clock and CMOS memory behind an index port and a data port.

The chip is :mod:`qvm_pc.rtc`; here are its ports, its options and the timer for its interrupts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from qvm_pc.rtc import SIZE, Rtc
from qvmcore.api import GuestEnd, Trigger, Vdev, VdevContext, Window

INDEX, DATA = 0, 1
#: Seconds until the next look at most, for a host whose clock is set meanwhile.
LONGEST_WAIT = 1.0


class Mc146818Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the vdev."""

    time: Annotated[
        Literal["utc", "local"],
        msgspec.Meta(description="what the clock shows: UTC or the host's local time"),
    ] = "utc"
    offset: Annotated[
        int,
        msgspec.Meta(
            ge=-(10**9), le=10**9, description="seconds the clock is ahead of that (negative: behind)"
        ),
    ] = 0
    reg: Annotated[
        str | list[str],
        msgspec.Meta(
            description="bytes set at power-on: 'INDEX,VALUE' or a list of such, for example '0x10,0x40'"
        ),
    ] = []

    def __post_init__(self) -> None:
        presets(self.reg)


class Mc146818(Vdev):
    """The clock. Serial by the framework: ports and timer never run at the same time."""

    vdev_type = "mc146818"
    summary = "real-time clock with CMOS memory"
    Options = Mc146818Options
    windows = (Window(2, access=frozenset({1})),)
    irqs = 1
    trigger = Trigger.LEVEL
    space = "io"
    acpi_hid = "PNP0B00"

    def __init__(self, ctx: VdevContext, options: Mc146818Options) -> None:
        super().__init__(ctx, options)
        ahead = time.localtime(self.clock()).tm_gmtoff if options.time == "local" else 0
        self._rtc = Rtc(self.clock, options.offset + ahead)
        for index, value in presets(options.reg):
            self._rtc.write(index, value)
        self._index = 0
        self._level = False
        self._told = False
        #: When the timers under way go off, in monotonic seconds; the last one is the next one.
        self._timers: list[float] = []

    @staticmethod
    def clock() -> float:
        """The host's clock, seconds since 1970; tests have their own."""
        return time.time()

    def on_reset(self) -> None:
        """As the RESET pin does: the time of day and the memory stay."""
        self._rtc.reset()
        self._index = 0
        self._settle()

    def on_terminate(self, end: GuestEnd) -> None:
        """Nothing of the host is held."""

    def status(self) -> Mapping[str, object]:
        """The time of day, seconds since 1970, and the interrupt line."""
        return {"time": int(self._rtc.now), "interrupt": self._level}

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """The byte the index points to. The index port cannot be read."""
        if offset == INDEX:
            return 0xFF
        value = self._rtc.read(self._index)
        self._settle()
        return value

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """The index (its highest bit is the PC's NMI mask, which is not here), or the byte there."""
        if offset == INDEX:
            self._index = value % SIZE
            return
        if not self._rtc.write(self._index, value) and not self._told:
            self._told = True
            self.ctx.log.warning(
                "%s: the guest set a time that does not exist; the clock goes on as before", self.ctx.name
            )
        self._settle()

    def _settle(self) -> None:
        """Drive the interrupt line, and see to it that the next event is noticed."""
        level = self._rtc.interrupt
        if level is not self._level:
            self._level = level
            self.ctx.irq().set(level)
        wait = self._rtc.due()
        if wait is None:
            return
        wait = min(wait, LONGEST_WAIT)
        due = time.monotonic() + wait
        # A timer cannot be taken back, so one that comes early enough does for later events as well.
        if not self._timers or due < self._timers[-1]:
            self._timers.append(due)
            self.ctx.worker.call_later(wait, self._look)

    def _look(self) -> None:
        """Worker: a timer has gone off; the newest one is always the first."""
        self._timers.pop()
        self._rtc.look()
        self._settle()


def presets(reg: str | list[str]) -> list[tuple[int, int]]:
    """Index and value of each ``INDEX,VALUE``. ValueError, in a sentence, for one that is none."""
    found = []
    for text in [reg] if isinstance(reg, str) else reg:
        index, comma, value = text.partition(",")
        try:
            pair = int(index, 0), int(value, 0)
        except ValueError:
            pair = -1, -1
        if not comma or not 0 <= pair[0] < SIZE or not 0 <= pair[1] <= 0xFF:
            raise ValueError(
                f"reg: {text!r} is no register and value; expected 'INDEX,VALUE' with an index of 0 to "
                f"{SIZE - 1:#x} and a value of 0 to 0xff, for example '0x10,0x40'"
            )
        found.append(pair)
    return found
