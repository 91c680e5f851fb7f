"""Interrupts of a function as plain lines (floor 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvmcore.pci.interrupts import PciInterrupts


class FunctionLine:
    """One interrupt source of a function as a plain line: MSI-X message or INTx level, as enabled."""

    def __init__(self, interrupts: PciInterrupts, index: int) -> None:
        self._interrupts = interrupts
        self._index = index
        self._level = False

    def pulse(self) -> None:
        """One message, or one pulse of ``INTA#``."""
        if self._interrupts.msix_enabled:
            self._interrupts.signal(self._index)
        else:
            self._interrupts.pulse_intx()

    def set(self, level: bool) -> None:
        """A rising edge sends the message; INTx follows the level."""
        rising, self._level = level and not self._level, level
        self._interrupts.set_intx(level, self._index)
        if rising:
            self._interrupts.signal(self._index)
