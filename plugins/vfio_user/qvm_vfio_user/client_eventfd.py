"""Eventfds of the client's."""

from __future__ import annotations

import os
import select
from pathlib import Path


def check_eventfd(fd: int) -> None:
    """Raises ValueError for a descriptor that is no eventfd, and closes it."""
    try:
        kind = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError as error:
        os.close(fd)
        raise ValueError(f"an eventfd was expected: {error.strerror}") from error
    if kind != "anon_inode:[eventfd]":
        os.close(fd)
        raise ValueError(f"an eventfd was expected, not {kind[:60]!r}")


class ClientEventFd:
    """One that this side only writes.

    Takes a descriptor over, on failure too. Raises ValueError for one that is no eventfd. Not thread-safe.

    The client holds the other end, so a write must not wait for it: the counter is looked at first. Whether
    a write would block is no property of our descriptor but of the file we share, which the client may
    change at any time.
    """

    def __init__(self, fd: int) -> None:
        check_eventfd(fd)
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def send(self) -> None:
        """Add one. Nothing when the counter is full: the client has not looked since."""
        if self._poll.poll(0):
            try:
                os.eventfd_write(self._fd, 1)
            except BlockingIOError:
                pass  # somebody filled it just now

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
