"""The hardware as one step sees it: once the step is abandoned, its thread reaches it no more.

The access such a thread sits in cannot be taken back. Whatever it would do next, perhaps minutes later
and on a device that somebody else has by then, fails.
"""

from __future__ import annotations

from typing import Any

from qvm_quiesce.hardware import Hardware, HardwareError


class Leash:
    """Passes everything on to ``hardware`` until :meth:`cut`. Any thread."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._held = True

    def cut(self) -> None:
        """From now on every use raises HardwareError. Idempotent."""
        self._held = False

    def __getattr__(self, name: str) -> Any:
        if not self._held:
            raise HardwareError(f"{self._hardware.name}: this step was abandoned")
        return getattr(self._hardware, name)
