"""Descriptors for wake-ups between us and a client: eventfds and pipes, and sockets in place of pipes.

Whatever else a client sends could block us, or be ready for ever; so could a socket that we read from. They
are made non-blocking, which for an eventfd is so on the client's side, too: there it matters only to a
writer that finds 2**64 - 2 wake-ups.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from pathlib import Path

from qvm_vhost_user.wire import Fd
from qvmcore.api import ClientError

_ONE = (1).to_bytes(8, "little")
_EVENTFD = "anon_inode:[eventfd]"


def is_unix_stream(number: int) -> bool:
    """Whether a descriptor is a Unix stream socket."""
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        return False
    with socket.socket(fileno=number) as borrowed:
        found = borrowed.family, borrowed.type
        borrowed.detach()
    return found == (socket.AF_UNIX, socket.SOCK_STREAM)


def check(fd: Fd, what: str, *, writes: bool) -> None:
    """Make a client's descriptor non-blocking. Raises ClientError when it is not fit for wake-ups.

    ``writes``: whether it is we who signal through it.
    """
    number = fd.number
    try:
        kind = str(Path(f"/proc/self/fd/{number}").readlink())
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        mode = os.fstat(number).st_mode
        # User Mode Linux signals itself through a pair of sockets.
        fit = kind == _EVENTFD or stat.S_ISFIFO(mode) or (writes and is_unix_stream(number))
        if not fit:
            raise ClientError(f"{what} is {kind}, expected an eventfd or a pipe")
        if flags & os.O_ACCMODE not in (os.O_RDWR, os.O_WRONLY if writes else os.O_RDONLY):
            raise ClientError(f"{what} cannot be {'written' if writes else 'read'}")
        fcntl.fcntl(number, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    except OSError as error:
        raise ClientError(f"{what} cannot be used: {error.strerror}") from error


class Notifier:
    """Where we signal the client: a call or an error descriptor, or none. Any thread."""

    def __init__(self) -> None:
        self._fd: Fd | None = None
        self._number = -1
        self._lock = threading.Lock()

    def set(self, fd: Fd | None) -> None:
        """Signal through another descriptor from now on; the old one is closed."""
        with self._lock:
            old, self._fd = self._fd, fd
            self._number = -1 if fd is None else fd.number
        if old is not None:
            old.close()

    def signal(self) -> None:
        """One wake-up; nothing without a descriptor, or when nobody reads."""
        # The lock keeps a late signal from reaching whatever got the closed descriptor's number.
        with self._lock:
            if self._number >= 0:
                try:
                    os.write(self._number, _ONE)
                except BlockingIOError:
                    # Full of wake-ups: the reader has enough to come for.
                    pass
                except OSError:
                    # A pipe whose other end has gone; the connection will end, too.
                    self._number = -1
