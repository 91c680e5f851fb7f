"""Interrupt lines (floor 1). A line is an eventfd, an MSI message or a level on a controller."""

from __future__ import annotations

from typing import Protocol


class IrqLine(Protocol):
    """One interrupt of a vdev, bound at freeze. Safe to call from any thread; never blocks."""

    def pulse(self) -> None:
        """Signal once: an edge, or assert and de-assert of a level line."""

    def set(self, level: bool) -> None:
        """Drive the line. Repeating the current level does nothing."""


class NullIrq:
    """A line that goes nowhere: for a vdev whose VM file gives no ``intr``, and after an end."""

    def pulse(self) -> None:
        """Nothing is connected."""

    def set(self, level: bool) -> None:
        """Nothing is connected."""
