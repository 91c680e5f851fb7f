"""Capture of every frame that passes, as a pcap file (nanoseconds, link type Ethernet).

A capture never harms traffic: it ends, with one line in the log, when the disk is full, the limit
is reached or anything else goes wrong. What is in the file then is whole.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qvm_virtio_net.spec import FRAME_BYTES_MAX
from qvmcore.api import HostError

_MAGIC_NANOSECONDS = 0xA1B23C4D
_ETHERNET = 1
_FILE_HEADER = struct.Struct("=IHHiIII")
_RECORD = struct.Struct("=IIII")


class Capture:
    """One file being written. ``record`` on the worker thread, ``close`` on any."""

    def __init__(self, path: Path, limit: int, complain: Callable[[str], None]) -> None:
        """Make the file, empty. Raises HostError."""
        self.path = path
        self.frames = 0
        self._complain = complain
        self._limit = limit
        self._size = 0
        try:
            # Not to wait for the reader of a pipe: only a file can take back half a record.
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise HostError.from_os("write the capture", path, error, hint="check the option pcap") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise HostError(f"the capture {path} is not a file; name a new one in the option pcap")
            os.ftruncate(self._fd, 0)
            self._write([_FILE_HEADER.pack(_MAGIC_NANOSECONDS, 2, 4, 0, 0, FRAME_BYTES_MAX, _ETHERNET)])
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise HostError.from_os("write the capture", path, error) from error
            raise

    def record(self, frame: Sequence[memoryview]) -> None:
        """Append a frame that lies in several pieces."""
        if self._fd < 0:
            return
        now = time.time_ns()
        length = sum(map(len, frame))
        if self._size + _RECORD.size + length > self._limit:
            self._end(f"it has its limit of {self._limit} bytes (pcap_limit)")
            return
        seconds, nanoseconds = divmod(now, 1_000_000_000)
        try:
            self._write([_RECORD.pack(seconds & 0xFFFFFFFF, nanoseconds, length, length), *frame])
        except OSError as error:
            self._end(error.strerror or str(error))
            return
        self.frames += 1

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """All or nothing, at the end of what is whole."""
        wanted = sum(map(len, pieces))
        # os.pwritev takes as many as IOV_MAX; a frame that is cut finer is put together first.
        buffers = pieces if len(pieces) < 1000 else [b"".join(pieces)]
        done = os.pwritev(self._fd, buffers, self._size)
        if done < wanted:
            # A full disk takes what fits; the next call says why it took no more.
            rest = b"".join(pieces)[done:]
            while rest:
                count = os.pwrite(self._fd, rest, self._size + done)
                rest = rest[count:]
                done += count
        self._size += wanted

    def _end(self, why: str) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            why = f"{why}; its last record is cut ({error.strerror})"
        self._complain(f"the capture {self.path} ends after {self.frames} frames: {why}")
        self.close()
