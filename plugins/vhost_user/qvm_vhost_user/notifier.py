"""Descriptors for wake-ups between us and a client: eventfds; what we signal may be a pipe or a socket, too.

Whatever else a client sends could block us, or be ready for ever. Nothing is read from what it rings with.
What we write to is made non-blocking, which for an eventfd is so on the client's side, too: there it matters
only to a writer that finds 2**64 - 2 wake-ups. The client could take that back, and hold a thread of ours in
a write: pipes are opened anew, sockets are told with every byte not to wait, and out of an eventfd whoever
waits is let go (:meth:`Notifier.release`).
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from qvm_vhost_user.stream_call import StreamCall
from qvm_vhost_user.wire import Fd
from qvmcore.api import ClientError, Worker

_ONE = (1).to_bytes(8, "little")
_EVENTFD = "anon_inode:[eventfd]"
#: Seconds after which a thread that signals is taken to wait.
_PATIENCE = 0.05


def is_unix_stream(number: int) -> bool:
    """Whether a descriptor is a Unix stream socket."""
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        return False
    with socket.socket(fileno=number) as borrowed:
        found = borrowed.family, borrowed.type
        borrowed.detach()
    return found == (socket.AF_UNIX, socket.SOCK_STREAM)


def check_kick(fd: Fd, what: str) -> None:
    """Raises ClientError for a client's descriptor that is not one to be woken by."""
    kind = str(Path(f"/proc/self/fd/{fd.number}").readlink())
    if kind != _EVENTFD:
        raise ClientError(f"{what} is {kind}, expected an eventfd")


def check_call(fd: Fd, what: str) -> None:
    """Make a client's descriptor one that we can signal without waiting. Raises ClientError."""
    number = fd.number
    try:
        kind = str(Path(f"/proc/self/fd/{number}").readlink())
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        mode = os.fstat(number).st_mode
        # User Mode Linux signals itself through a pair of sockets.
        if kind != _EVENTFD and not stat.S_ISFIFO(mode) and not is_unix_stream(number):
            raise ClientError(f"{what} is {kind}, expected an eventfd or a pipe")
        if flags & os.O_ACCMODE not in (os.O_RDWR, os.O_WRONLY):
            raise ClientError(f"{what} cannot be written")
        fcntl.fcntl(number, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        if stat.S_ISFIFO(mode):
            _open_anew(fd)
    except OSError as error:
        raise ClientError(f"{what} cannot be used: {error.strerror}") from error


def _open_anew(fd: Fd) -> None:
    """The same pipe with flags of our own."""
    try:
        anew = os.open(f"/proc/self/fd/{fd.number}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        # Another user's. It has to be trusted that far.
        return
    os.dup2(anew, fd.number, inheritable=False)
    os.close(anew)


class Notifier:
    """Where we signal the client: a call or an error descriptor, or none. Any thread.

    ``worker()`` is the thread that says again what went into a socket and was not taken.
    ``rarely``: look first whether there is room. For what is signalled by the session's thread, which
    nobody could let go.
    """

    def __init__(self, worker: Callable[[], Worker], *, rarely: bool = False) -> None:
        self._fd: Fd | None = None
        self._number = -1
        self._stream: StreamCall | None = None
        self._worker = worker
        self._rarely = rarely
        self._lock = threading.Lock()

    def set(self, fd: Fd | None) -> None:
        """Signal through another descriptor from now on; the old one is closed. Raises ClientError."""
        stream = None
        if fd is not None and stat.S_ISSOCK(os.fstat(fd.number).st_mode):
            stream = StreamCall(socket.socket(fileno=fd.take()), self._worker(), self._again)
            fd = None
        self._acquire()
        try:
            old, self._fd = self._fd, fd
            old_stream, self._stream = self._stream, stream
            self._number = -1 if fd is None else fd.number
        finally:
            self._lock.release()
        for each in (old, old_stream):
            if each is not None:
                each.close()

    def release(self) -> None:
        """Let go a thread that waits in :meth:`signal`. The client, which is leaving, may miss wake-ups."""
        self._acquire()
        self._lock.release()

    def _acquire(self) -> None:
        while not self._lock.acquire(timeout=_PATIENCE):
            # An eventfd full of wake-ups, blocking again: taking them makes room for the one that waits.
            try:
                os.set_blocking(self._number, False)
                os.read(self._number, 8)
            except OSError:
                pass

    def signal(self) -> None:
        """One wake-up; nothing without a descriptor, or when nobody reads."""
        # The lock keeps a late signal from reaching whatever got the closed descriptor's number.
        with self._lock:
            if self._stream is not None:
                self._stream.send()
            elif self._number >= 0 and (not self._rarely or _has_room(self._number)):
                try:
                    os.write(self._number, _ONE)
                except BlockingIOError:
                    # Full of wake-ups: the reader has enough to come for.
                    pass
                except OSError:
                    # A pipe whose other end has gone; the connection will end, too.
                    self._number = -1

    def _again(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.again()


def _has_room(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return bool(poll.poll(0))
