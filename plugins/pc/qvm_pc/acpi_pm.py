"""vdev ``acpi-pm``: the fixed hardware of ACPI (ACPI 6.5, 4.8.3) and a reset register, in 16 ports.

====== ===== ==========================================================================
offset bytes register
====== ===== ==========================================================================
0      2     PM1a status: write ones to clear
2      2     PM1a enable
4      2     PM1a control; SLP_TYP 5 with SLP_EN is the power switch, other ones do nothing
8      4     PM timer, 3.579545 MHz, 32 bits
12     1     reset register: 0x01 resets the machine
====== ===== ==========================================================================

The system is always in ACPI mode: SCI_EN is 1 and there is no SMI command port to change it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from qvmcore.api import GuestEnd, NoOptions, Trigger, Vdev, VdevContext, Window

PM1_STATUS, PM1_ENABLE, PM1_CONTROL, TIMER, RESET = 0, 2, 4, 8, 12
#: Event bits, the same in status and enable.
EVENT_TIMER, EVENT_BUTTON = 1 << 0, 1 << 8
#: Events a guest may enable: timer, global lock, power and sleep button, alarm of the clock.
ENABLES = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10
CONTROL_SCI_EN, CONTROL_SLP_TYP_SHIFT, CONTROL_SLP_EN = 1 << 0, 10, 1 << 13
CONTROL_SLP_TYP = 7 << CONTROL_SLP_TYP_SHIFT
SLP_TYP_S5 = 5
RESET_VALUE = 0x01
PM_TIMER_HZ = 3_579_545
#: TMR_STS is set when the highest bit of the timer changes.
HALF = 1 << 31


class AcpiPm(Vdev):
    """Power button, power switch, reset and PM timer. Its interrupt is the SCI."""

    vdev_type = "acpi-pm"
    summary = "ACPI power management: power button, power off, reset, PM timer"
    Options = NoOptions
    windows = (Window(16, access=frozenset({1, 2, 4})),)
    irqs = 1
    trigger = Trigger.LEVEL
    space = "io"

    def __init__(self, ctx: VdevContext, options: NoOptions) -> None:
        super().__init__(ctx, options)
        self.presses = 0
        self._started = self.clock()
        self._level = False
        self._alarm_set = False
        self._ignored: set[int] = set()
        self._status = self._enable = 0
        self._control = CONTROL_SCI_EN
        self._half = 0

    @staticmethod
    def clock() -> float:
        """Seconds that only go forward; tests have their own."""
        return time.monotonic()

    def on_reset(self) -> None:
        """Everything but the timer, which runs on."""
        self._status = self._enable = 0
        self._control = CONTROL_SCI_EN
        self._half = self._ticks() // HALF
        self._update()

    def on_button(self) -> bool:
        """Raise the power button event if the guest has enabled it; else it would not notice."""
        if not self._enable & EVENT_BUTTON:
            return False
        self.ctx.worker.call(self._press)
        return True

    def on_terminate(self, end: GuestEnd) -> None:
        """Nothing of the host is held."""

    def status(self) -> Mapping[str, object]:
        """How often the button was pressed, and the event registers."""
        return {"presses": self.presses, "status": self._status, "enable": self._enable}

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """Any bytes of the block; reserved ones read as zero."""
        self._note_timer()
        image = (
            self._status
            | self._enable << 8 * PM1_ENABLE
            | self._control << 8 * PM1_CONTROL
            | (self._ticks() & 0xFFFF_FFFF) << 8 * TIMER
        )
        return image >> 8 * offset & (1 << 8 * size) - 1

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """Any bytes of the block, each as a write of its own, lowest first."""
        self._note_timer()
        for place, byte in enumerate(value.to_bytes(size, "little"), offset):
            self._write(place, byte)
        self._update()

    def _write(self, place: int, byte: int) -> None:
        register, shift = place & ~1, 8 * (place & 1)
        if register == PM1_STATUS:
            self._status &= ~(byte << shift)
        elif register == PM1_ENABLE:
            self._enable = (self._enable & ~(0xFF << shift) | byte << shift) & ENABLES
        elif register == PM1_CONTROL:
            if shift:
                self._control = byte << 8 & CONTROL_SLP_TYP | CONTROL_SCI_EN
                if byte << 8 & CONTROL_SLP_EN:
                    self._sleep(self._control >> CONTROL_SLP_TYP_SHIFT & 7)
        elif place == RESET and byte == RESET_VALUE:
            self.ctx.request_reset("the guest wrote to the reset register")

    def _sleep(self, kind: int) -> None:
        if kind == SLP_TYP_S5:
            self.ctx.request_shutdown("the guest powered off", code=0)
        elif kind not in self._ignored:
            self._ignored.add(kind)
            self.ctx.log.warning(
                "%s: the guest asked for sleep type %d and is kept awake: only 5 (S5, power off) is there",
                self.ctx.name, kind,
            )  # fmt: skip

    def _ticks(self) -> int:
        return int((self.clock() - self._started) * PM_TIMER_HZ)

    def _press(self) -> None:
        """Worker: the button goes down."""
        self.presses += 1
        self._status |= EVENT_BUTTON
        self._update()

    def _note_timer(self) -> None:
        half = self._ticks() // HALF
        if half != self._half:
            self._half = half
            self._status |= EVENT_TIMER

    def _update(self) -> None:
        """The SCI, and one wake-up for the next change of the timer's highest bit if that interrupts."""
        level = bool(self._status & self._enable)
        if level is not self._level:
            self._level = level
            self.ctx.irq().set(level)
        if self._enable & EVENT_TIMER and not self._alarm_set:
            self._alarm_set = True
            left = (self._half + 1) * HALF - self._ticks()
            self.ctx.worker.call_later(max(0.0, left / PM_TIMER_HZ) + 0.001, self._timer_changed)

    def _timer_changed(self) -> None:
        """Worker: the highest bit of the timer is another one now."""
        self._alarm_set = False
        self._note_timer()
        self._update()
