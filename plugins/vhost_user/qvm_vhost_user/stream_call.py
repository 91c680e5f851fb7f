"""The call descriptor of User Mode Linux: one end of a pair of Unix stream sockets.

UML turns what arrives there into a signal to itself. A signal that comes after it has decided to be idle,
and before it sleeps, is put off until something else wakes it: its next timer, up to a tick of 10 ms. An
answer from another processor takes about as long as that way to sleep, so this is not rare: at depth 1 it
was one read in seven. So we look whether a wake-up was taken, and say it again while it was not. A used
buffer notification too many does no harm (virtio 1.4, 2.7.7.1).
"""

from __future__ import annotations

import fcntl
import socket
import termios
from collections.abc import Callable

from qvm_vhost_user.timer import Timer
from qvmcore.api import ClientError, Worker

_ONE = (1).to_bytes(8, "little")
_NOTHING = bytes(4)
#: Microseconds until it is said again for the first time: longer than a guest that is awake takes. Then
#: after twice as long each time. UML's own tick is not longer than the last.
FIRST, LAST = 100, 12_800


class StreamCall:
    """Takes ``stream`` over. Not thread-safe.

    ``worker`` calls ``due`` when it may be time for :meth:`again`. Raises ClientError when there is no
    descriptor left for a timer.
    """

    def __init__(self, stream: socket.socket, worker: Worker, due: Callable[[], None]) -> None:
        self._stream = stream
        self._worker = worker
        self._wait = FIRST
        try:
            self._timer = Timer()
        except OSError as error:
            stream.close()
            raise ClientError(f"no timer for a call descriptor: {error.strerror}") from error
        worker.watch(self._timer.fd, due, edge=True)

    def send(self) -> None:
        """One wake-up. Nothing when the socket is full, or its other end has gone."""
        self._say()
        self._wait = FIRST
        self._timer.start(FIRST)

    def again(self) -> None:
        """Say it again, unless it was taken; after the longest wait nothing more is said."""
        if self._wait <= LAST and fcntl.ioctl(self._stream, termios.TIOCOUTQ, _NOTHING) != _NOTHING:
            self._say()
            self._wait *= 2
            self._timer.start(self._wait)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._worker.unwatch(self._timer.fd)
        self._timer.close()
        self._stream.close()

    def _say(self) -> None:
        try:
            self._stream.send(_ONE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            # Full, which is enough to come for; or the other end has gone, as the connection will.
            pass
