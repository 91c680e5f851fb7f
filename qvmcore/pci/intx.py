"""INTx lines shared by several functions (floor 4): the wired-or of their levels."""

from __future__ import annotations

import threading
from collections.abc import Callable

from qvmcore.irq import IrqLine
from qvmcore.pci.sources import Stop


class SharedLine:
    """One input of the interrupt controller with several drivers. Safe from any thread.

    ``listen(fd, resample)`` has the engine drive it by an eventfd; it ors that with what comes from here.
    """

    def __init__(
        self, line: IrqLine, listen: Callable[[int, int], Stop | None] = lambda fd, resample: None
    ) -> None:
        self._line = line
        self.listen = listen
        self._lock = threading.Lock()
        self._high: set[object] = set()

    def drive(self, driver: object, level: bool) -> None:
        """``driver`` wants the line high, or no longer; it is high while anyone does."""
        with self._lock:
            before = bool(self._high)
            if level:
                self._high.add(driver)
            else:
                self._high.discard(driver)
            if bool(self._high) != before:
                self._line.set(not before)

    def pulse(self) -> None:
        """Signal once; a line that is high signals anyway."""
        with self._lock:
            if not self._high:
                self._line.pulse()
