"""Input from something epoll refuses: a regular file, /dev/null."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from qvmcore.api import Worker

_READ_SIZE = 4096


class FileReader:
    """Feeds a file to ``on_input`` a piece at a time, on the worker thread. Owns ``fd``."""

    def __init__(self, fd: int, *, worker: Worker, on_input: Callable[[bytes], None]) -> None:
        self._fd = fd
        self._worker = worker
        self._on_input = on_input
        self._lock = threading.Lock()
        self._paused = self._scheduled = self._ended = False
        self.received = 0

    def start(self) -> None:
        """Begin to read."""
        self._schedule()

    def pause_input(self, paused: bool) -> None:
        """Stop or restart reading. Any thread."""
        self._paused = paused
        if not paused:
            self._schedule()

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _schedule(self) -> None:
        with self._lock:
            if self._scheduled or self._ended or self._fd < 0:
                return
            self._scheduled = True
        self._worker.call(self._step)

    def _step(self) -> None:
        with self._lock:
            self._scheduled = False
            if self._paused or self._ended or self._fd < 0:
                return
            try:
                data = os.read(self._fd, _READ_SIZE)
            except OSError:
                # A file that cannot be read any more is a file that has ended.
                data = b""
            self._ended = not data
            self.received += len(data)
        if data:
            self._on_input(data)
            self._schedule()
