"""One non-blocking descriptor: bounded output buffer, input that can be paused, stall detection."""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
import time
from collections.abc import Callable

from qvmcore.api import Worker

#: Bytes of output held for a slow receiver before the guest is held back.
OUTPUT_LIMIT = 64 * 1024
#: Seconds without one byte taken after which a full receiver counts as gone. A Linux guest spins
#: with interrupts off while a console holds it back, so this must be short.
STALL_SECONDS = 5.0
_READ_SIZE = 4096


def nonblocking_copy(fd: int, flags: int) -> int:
    """A descriptor of its own for what ``fd`` is, non-blocking where the system allows.

    O_NONBLOCK belongs to the open file, which standard streams share with the shell and with other
    processes; so the file is opened once more instead. A regular file keeps its shared offset, and
    a socket cannot be opened again: those are duplicated.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        try:
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            # A socket, or a terminal that belongs to another user: share the open file.
            pass
    return os.dup(fd)


class Channel:
    """Owns ``fd`` and closes it.

    ``on_input(data)``, ``on_space()`` and ``on_lost(error)`` run on the worker thread; ``on_lost``
    comes once, with None at the end of file. Without ``on_input`` nothing is ever read. ``stall`` are
    the seconds after which a full receiver counts as gone; None: never, it is waited for.
    """

    def __init__(
        self,
        fd: int,
        *,
        worker: Worker,
        on_space: Callable[[], None],
        on_lost: Callable[[OSError | None], None],
        on_input: Callable[[bytes], None] | None = None,
        limit: int = OUTPUT_LIMIT,
        stall: float | None = STALL_SECONDS,
    ) -> None:
        self._fd = fd
        self._worker = worker
        self._on_input = on_input
        self._on_space = on_space
        self._on_lost = on_lost
        self._limit = limit
        self._stall = stall
        self._lock = threading.RLock()
        self._pending = bytearray()
        self._watched = (False, False)
        self._reading = on_input is not None
        self._paused = False
        self._starved = False
        self._stalled = False
        self._lost = False
        # Bytes written at a time, 0 for all. A descriptor that may block is asked first: a pipe or
        # socket that is ready takes PIPE_BUF for sure, a terminal only one byte.
        self._cautious = 0
        if os.get_blocking(fd) and not stat.S_ISREG(os.fstat(fd).st_mode):
            self._cautious = 1 if os.isatty(fd) else select.PIPE_BUF
        self.sent = self.received = self.dropped = 0

    def start(self) -> None:
        """Begin to read, if there is anyone to read for."""
        with self._lock:
            self._update()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Send or buffer ``data``; returns the bytes taken. Any thread."""
        with self._lock:
            if self._fd < 0 or self._lost or self._stalled:
                self.dropped += len(data)
                return len(data)
            view = memoryview(data)
            taken = 0 if self._pending else self._send(view)
            if self._lost:
                self.dropped += len(view) - taken
                return len(view)
            if taken < len(view):
                room = max(0, self._limit - len(self._pending))
                part = view[taken : taken + room]
                self._pending += part
                taken += len(part)
                if taken < len(view) and not self._starved:
                    self._starved = True
                    self._arm_stall()
                self._update()
            return taken

    def pause_input(self, paused: bool) -> None:
        """Stop or restart reading. Any thread."""
        with self._lock:
            self._paused = paused
            self._update()

    def flush(self, timeout: float) -> bool:
        """Write out the buffer with a deadline, seconds; False when bytes are left."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                if self._fd < 0 or self._lost or self._stalled or not self._pending:
                    return not self._pending
                self._send_pending()
                fd, empty = self._fd, not self._pending
            left = deadline - time.monotonic()
            if empty or left <= 0:
                return empty
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll(min(left, 0.1) * 1000)

    def close(self) -> None:
        """Close the descriptor; what is buffered counts as dropped. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                self._worker.unwatch(self._fd)
                os.close(self._fd)
                self._fd = -1
                self.dropped += len(self._pending)
                self._pending.clear()

    def _update(self) -> None:
        """Watch for exactly what is wanted now (lock held)."""
        open_ = self._fd >= 0 and not self._lost
        wanted = (open_ and self._reading and not self._paused, open_ and bool(self._pending))
        if wanted == self._watched:
            return
        self._watched = wanted
        if any(wanted):
            self._worker.watch(
                self._fd,
                self._readable if wanted[0] else None,
                self._writable if wanted[1] else None,
            )
        elif self._fd >= 0:
            self._worker.unwatch(self._fd)

    def _send(self, view: memoryview) -> int:
        """Write what fits right now (lock held); an error makes the channel lost."""
        done = 0
        try:
            while done < len(view):
                chunk = view[done:]
                if self._cautious:
                    if not self._ready():
                        break
                    chunk = chunk[: self._cautious]
                done += os.write(self._fd, chunk)
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(error)
        self.sent += done
        return done

    def _ready(self) -> bool:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        return bool(poller.poll(0))

    def _send_pending(self) -> int:
        with memoryview(self._pending) as view:
            sent = self._send(view)
        del self._pending[:sent]
        return sent

    def _readable(self) -> None:
        with self._lock:
            if not self._watched[0]:
                return
            try:
                data = os.read(self._fd, _READ_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(error)
                return
            if not data:
                self._reading = False
                self._update()
            self.received += len(data)
        if not data:
            self._on_lost(None)
        elif self._on_input is not None:
            self._on_input(data)

    def _writable(self) -> None:
        with self._lock:
            if self._fd < 0 or self._lost:
                return
            if self._send_pending():
                self._stalled = False
            space = self._starved and len(self._pending) <= self._limit // 2
            if space:
                self._starved = False
            self._update()
        if space:
            self._on_space()

    def _lose(self, error: OSError) -> None:
        """The descriptor is useless (lock held); tell the owner on the worker, outside the lock."""
        if self._lost:
            return
        self._lost = True
        self._update()
        self._worker.call(lambda: self._on_lost(error))
        if self._starved:
            self._starved = False
            self._worker.call(self._on_space)

    def _arm_stall(self) -> None:
        if self._stall is None:
            return
        before = self.sent

        def check() -> None:
            with self._lock:
                if not self._starved or self._fd < 0:
                    return
                if self.sent != before:
                    self._arm_stall()
                    return
                self._stalled = True
                self._starved = False
            self._on_space()

        self._worker.call_later(self._stall, check)

    @property
    def stalled(self) -> bool:
        """Whether the receiver takes nothing, so that output is dropped."""
        return self._stalled


def hung_up(fd: int) -> bool:
    """Whether the other end of ``fd`` is gone (POLLHUP), asked without waiting."""
    poller = select.poll()
    poller.register(fd, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poller.poll(0))


def unpollable(fd: int) -> bool:
    """Whether epoll refuses ``fd``: a regular file, /dev/null and other things always ready."""
    with select.epoll() as probe:
        try:
            probe.register(fd, select.EPOLLIN)
        except OSError as error:
            return error.errno == errno.EPERM
    return False
