"""What the state machine needs of a transport."""

from __future__ import annotations

from typing import Protocol


class Transport(Protocol):
    """Carries notifications to the driver; any thread, must not block."""

    def interrupt_queue(self, index: int) -> None:
        """Send a used buffer notification for a queue."""

    def interrupt_config(self) -> None:
        """Send a configuration change notification."""

    def reset(self) -> None:
        """Take back every interrupt not acknowledged yet, and forget the selectors."""


class NoTransport:
    """Before a transport is attached nobody listens."""

    def interrupt_queue(self, index: int) -> None:
        """Nobody listens."""

    def interrupt_config(self) -> None:
        """Nobody listens."""

    def reset(self) -> None:
        """Nothing is pending."""
