"""What a disk counts, and how it complains without filling the log."""

from __future__ import annotations

import logging
import time

from qvm_virtio_blk import spec

#: Seconds between two lines about failed requests: a guest can make thousands a second.
LOG_PERIOD = 10.0


class Stats:
    """Counters of one disk. Written by the worker or its visitor, read by any thread."""

    __slots__ = (
        "_log", "_log_after", "_unlogged", "bytes_discarded", "bytes_read", "bytes_written",
        "bytes_zeroed", "discards", "errors", "flushes", "reads", "write_zeroes", "writes",
    )  # fmt: skip

    def __init__(self, log: logging.LoggerAdapter[logging.Logger]) -> None:
        self.reads = self.writes = self.flushes = self.errors = 0
        self.discards = self.write_zeroes = 0
        self.bytes_read = self.bytes_written = self.bytes_discarded = self.bytes_zeroed = 0
        self._log = log
        self._log_after = 0.0
        self._unlogged = 0

    def failed(self, name: str, why: str) -> None:
        """Count a failed request of disk ``name``; log it, at most once in LOG_PERIOD."""
        self.errors += 1
        now = time.monotonic()
        if now < self._log_after:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} more since the last line)" if self._unlogged else ""
        self._log.warning("%s: request failed: %s%s", name, why, more)
        self._log_after, self._unlogged = now + LOG_PERIOD, 0

    def count(self, kind: int, length: int) -> None:
        """Count a request that was done: its type and the bytes of the disk it was about."""
        if kind == spec.T_IN:
            self.reads += 1
            self.bytes_read += length
        elif kind == spec.T_OUT:
            self.writes += 1
            self.bytes_written += length
        elif kind == spec.T_FLUSH:
            self.flushes += 1
        elif kind == spec.T_DISCARD:
            self.discards += 1
            self.bytes_discarded += length
        else:
            self.write_zeroes += 1
            self.bytes_zeroed += length

    def report(self) -> dict[str, object]:
        """The counters as JSON-able values."""
        return {name: getattr(self, name) for name in self.__slots__ if not name.startswith("_")}
