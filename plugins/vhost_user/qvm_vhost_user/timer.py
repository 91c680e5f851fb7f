"""A timer as a descriptor, to be watched beside others.

The time-out of epoll has milliseconds, and Python makes such timers itself only from 3.13 on.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time

_libc = ctypes.CDLL(None, use_errno=True)


class _Time(ctypes.Structure):
    """struct itimerspec: the period, which stays zero, and the time until it runs out."""

    _fields_ = (
        ("every_s", ctypes.c_long), ("every_ns", ctypes.c_long), ("s", ctypes.c_long), ("ns", ctypes.c_long),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _after(microseconds: int) -> object:
    """The same few times are asked for over and over, by the path of every request."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return ctypes.byref(_Time(0, 0, seconds, rest * 1000))


class Timer:
    """``fd`` becomes readable once, each time it has run out; an edge, so nobody has to read it.

    Raises OSError when there is no descriptor left. Any thread, but not after :meth:`close`.
    """

    def __init__(self) -> None:
        # Linux gives the flags the values of open's.
        self.fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def start(self, microseconds: int) -> None:
        """Run out once, after so long; whatever was going on before is forgotten."""
        _libc.timerfd_settime(self.fd, 0, _after(microseconds), None)

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
