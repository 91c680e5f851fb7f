"""For tests of vdevs with a serial line: an owner that records, and patience. Used by tests only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from qvm_chardev.device import CharDevice, EscapeActions, Wiring
from qvm_chardev.open import open_chardev
from qvmcore.api import Worker


class Owner:
    """Stands for the vdev: records what the device tells it."""

    def __init__(self, base: Path) -> None:
        self.errors: list[BaseException] = []
        self.worker = Worker("test", self.errors.append)
        self.input = bytearray()
        self.writable = 0
        self.resized = 0
        self.quits = 0
        self.presses = 0
        self.base = base
        self.connections: list[bool] = []
        self.log = logging.getLogger("test.chardev")

    def wiring(self, escape: bool = True) -> Wiring:
        """What the device gets."""
        return Wiring(
            self.worker, self.input.extend, self._on_writable, self._on_resize, self.log, "con0",
            EscapeActions(self._on_quit, self._on_power) if escape else None, self.base,
            self.connections.append,
        )  # fmt: skip

    def open(self, spec: str, *, lossless: bool = False) -> CharDevice:
        """``open_chardev`` with this owner's callbacks."""
        w = self.wiring()
        return open_chardev(
            spec, worker=w.worker, on_input=w.on_input, on_writable=w.on_writable, on_resize=w.on_resize,
            log=w.log, name=w.name, escape=w.escape, base=w.base, on_connection=w.on_connection,
            lossless=lossless,
        )  # fmt: skip

    def _on_writable(self) -> None:
        self.writable += 1

    def _on_resize(self) -> None:
        self.resized += 1

    def _on_quit(self) -> None:
        self.quits += 1

    def _on_power(self) -> None:
        self.presses += 1


def wait_for(condition: Callable[[], object], timeout: float = 5.0) -> bool:
    """Whether ``condition`` becomes true within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
