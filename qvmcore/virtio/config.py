"""The device configuration as the driver sees it: bytes and generation change together (virtio 1.4, 2.5)."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ConfigSnapshot:
    """A copy of ``source()``, renewed by :meth:`refresh` only. Any thread; a lock of its own, the last taken.

    A driver that finds the same generation before and after its reads has read one version: loads
    are served from the copy, so a device in the middle of changing its fields is never visible.
    """

    def __init__(self, source: Callable[[], bytes]) -> None:
        self._source = source
        self._lock = threading.Lock()
        # Taken at the first use: the device knows its configuration from on_configured on.
        self._bytes: bytes | None = None
        self._generation = 0
        self._seen = False

    @property
    def generation(self) -> int:
        """Differs from an earlier value if anything changed since; counts up, transports cut it."""
        with self._lock:
            self._seen = True
            return self._generation

    @property
    def length(self) -> int:
        """Bytes of the configuration."""
        with self._lock:
            return len(self._current())

    def read(self, offset: int, size: int) -> int:
        """``size`` bytes at ``offset``, little-endian; zero behind the end."""
        with self._lock:
            return int.from_bytes(self._current()[offset : offset + size], "little")

    def refresh(self) -> bool:
        """Take what the device has now; whether it differs."""
        with self._lock:
            old, self._bytes = self._bytes, self._source()
            if old is None or old == self._bytes:
                return False
            if self._seen:
                # Only who knows the number could compare, so an unread one is not spent: it has
                # as few as 8 bits on some transports.
                self._generation += 1
                self._seen = False
            return True

    def _current(self) -> bytes:
        if self._bytes is None:
            self._bytes = self._source()
        return self._bytes
