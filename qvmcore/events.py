"""Wake-ups and threads (floor 1): eventfds and the one worker thread of a vdev.

A vdev never starts a thread: it asks ``ctx.worker`` to watch a file descriptor or to call a
function, and the framework stops the worker with a deadline when the VM ends. Workers are daemon
threads, so a blocked one cannot keep the process alive.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager

log = logging.getLogger(__name__)


#: Descriptors that one look at them tells of; the others come with the next one.
MOST_EVENTS = 64
_NOTHING = None, None


def stack_of(ident: int | None) -> str:
    """Where the thread with this identifier is now, as a traceback's lines; empty when it has ended."""
    frame = sys._current_frames().get(ident or 0)
    return "".join(traceback.format_stack(frame)).strip() if frame else ""


class EventFd:
    """A counting wake-up usable by any thread, by KVM (ioeventfd, irqfd) and by other processes."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def signal(self) -> None:
        """Wake whoever waits; nothing once closed."""
        # The lock keeps a late signal from reaching whatever got the closed descriptor's number.
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def drain(self) -> int:
        """Take all wake-ups, how many there were; the owner's thread only."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


class Worker:
    """One named daemon thread running an event loop.

    ``on_error(exception)`` is called on the worker thread when a callback raises; the loop then
    goes on, unless the owner stops it. Callbacks hold ``serial`` while they run. Never more than one
    of them runs, what a visitor brings to :meth:`visit` included. With ``poll`` seconds the thread looks
    for more that long after each callback before it sleeps: no wake-up then, and a processor's time.
    All methods may be called from any thread.
    """

    def __init__(
        self,
        name: str,
        on_error: Callable[[BaseException], None],
        serial: AbstractContextManager[object] | None = None,
        poll: float = 0.0,
    ) -> None:
        self.name = name
        self._poll_ns = int(poll * 1e9)
        self._on_error = on_error
        self._serial = serial
        self._turn = threading.Lock()  # held by whoever runs a callback; taken before ``serial``
        self._visitor: int | None = None
        self._wake = EventFd()
        self._epoll = select.epoll()
        self._epoll.register(self._wake.fd, select.EPOLLIN)
        self._watched: dict[int, tuple[Callable[[], None] | None, Callable[[], None] | None]] = {}
        self._calls: list[Callable[[], None]] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._lock = threading.Lock()
        self._stop = False
        self._own_thread: threading.Thread | None = None

    def watch(
        self,
        fd: int,
        on_readable: Callable[[], None] | None = None,
        on_writable: Callable[[], None] | None = None,
        *,
        edge: bool = False,
    ) -> None:
        """Call the given functions on the worker thread while ``fd`` is ready; replaces a former watch.

        ``edge``: once for each time it becomes ready, so that nobody has to read what only wakes up.

        A hang-up or error of ``fd`` counts as readable, or as writable if only that is watched.
        Nothing happens once the worker is stopped. Raises OSError for a descriptor that cannot be
        polled (a regular file).
        """
        mask = (select.EPOLLIN if on_readable else 0) | (select.EPOLLOUT if on_writable else 0)
        mask |= select.EPOLLET if edge else 0
        with self._lock:
            if self._epoll.closed:
                return
            if fd in self._watched:
                self._epoll.modify(fd, mask)
            else:
                self._epoll.register(fd, mask)
            self._watched[fd] = (on_readable, on_writable)
        self._start()

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``; harmless when it is not watched or closed already."""
        with self._lock:
            if self._watched.pop(fd, None) is not None and not self._epoll.closed:
                try:
                    self._epoll.unregister(fd)
                except OSError:
                    # Closing a descriptor removes it from the epoll set by itself.
                    pass

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` once on the worker thread, soon."""
        with self._lock:
            self._calls.append(function)
        self._wake.signal()
        self._start()

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Run ``function`` once on the worker thread after ``seconds`` of monotonic time."""
        with self._lock:
            self._timers.append((time.monotonic() + seconds, function))
            self._timers.sort(key=lambda item: item[0])
        self._wake.signal()
        self._start()

    def visit(self, function: Callable[[], bool]) -> bool:
        """Run ``function`` on the calling thread, if the worker is idle, and give what it returns.

        False, without a call, when the worker is busy, has calls to make, or does not run. It spares
        two changes of threads where the work is shorter than these. What ``function`` raises reaches
        the caller, and ``serial`` is not taken.
        """
        if self._calls or self._own_thread is None or not self._turn.acquire(blocking=False):
            return False
        try:
            self._visitor = threading.get_ident()
            return not self._stop and function()
        finally:
            self._visitor = None
            self._turn.release()

    def without_visitor(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for a visitor, or a callback, to be gone; False when it stays."""
        if self._visitor == threading.get_ident():
            return True
        if not self._turn.acquire(timeout=max(0.0, timeout)):
            return False
        self._turn.release()
        return True

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._own_thread is not None and self._own_thread.is_alive()

    @property
    def ident(self) -> int | None:
        """The thread that runs the callbacks, its own or a visitor's; for stack dumps when it hangs."""
        return self._visitor or (self._own_thread.ident if self._own_thread is not None else None)

    def stop(self, timeout: float) -> bool:
        """Ask the loop to end and wait at most ``timeout`` seconds; False when it, or a visitor, still runs.

        Called from a callback it only asks. Idempotent.
        """
        with self._lock:
            # Not between the making and the start of the thread: it could not be waited for.
            self._stop = True
            thread = self._own_thread
        self._wake.signal()
        if thread is None or threading.get_ident() == self.ident:
            if thread is None:
                self._close()
            return True
        deadline = time.monotonic() + timeout
        thread.join(timeout)
        return not thread.is_alive() and self.without_visitor(deadline - time.monotonic())

    def _start(self) -> None:
        with self._lock:
            if self._own_thread is None and not self._stop:
                self._own_thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._own_thread.start()

    def _run(self) -> None:
        try:
            while not self._stop:
                self._run_watches(self._look() or self._epoll.poll(self._timeout(), MOST_EVENTS))
                if (self._calls or self._timers) and not self._stop:
                    self._run_calls()
        finally:
            self._close()

    def _run_watches(self, ready: list[tuple[int, int]]) -> None:
        wake = self._wake.fd
        for fd, events in ready:
            if fd == wake:
                self._wake.drain()
                continue
            with self._turn:
                if self._stop:
                    return
                # Looked up with the turn: a visitor may have been the one to end the watch.
                readable, writable = self._watched.get(fd, _NOTHING)
                failed = events & (select.EPOLLHUP | select.EPOLLERR)
                if readable is not None and (events & select.EPOLLIN or failed):
                    self._guarded(readable)
                if writable is not None and (events & select.EPOLLOUT or (failed and readable is None)):
                    self._guarded(writable)

    def _look(self) -> list[tuple[int, int]]:
        """What became ready while the thread looked for it; nothing when it may sleep."""
        if not self._poll_ns:
            return []
        poll, now = self._epoll.poll, time.perf_counter_ns
        end = now() + self._poll_ns
        ready = poll(0, MOST_EVENTS)
        while not ready and not self._calls and now() < end:
            ready = poll(0, MOST_EVENTS)
        return ready

    def _timeout(self) -> float | None:
        if not self._calls and not self._timers:
            return None  # whoever adds one later signals
        with self._lock:
            if self._calls:
                return 0
            return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_calls(self) -> None:
        now = time.monotonic()
        with self._lock:
            calls, self._calls = self._calls, []
            while self._timers and self._timers[0][0] <= now:
                calls.append(self._timers.pop(0)[1])
        for call in calls:
            with self._turn:
                if self._stop:
                    return
                self._guarded(call)

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            if self._serial is None:
                function()
            else:
                with self._serial:
                    function()
        except Exception as error:
            self._on_error(error)

    def _close(self) -> None:
        with self._lock:
            self._epoll.close()
            self._wake.close()
            self._watched.clear()
