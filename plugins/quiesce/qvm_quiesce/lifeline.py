"""How a guard hears of its VM's death before the kernel has freed the VM's memory.

A process that is killed gives up its memory first and its descriptors afterwards: with gigabytes of guest
RAM its socket closes some 100 ms after its death. A robust mutex is looked at before that. One lies in
memory that VM and guard share; a thread of the VM holds it all the time and does nothing else, so it dies
as soon as the process begins to, whatever the others are doing.

A core dump is written before even that: see ``guard_main``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from contextlib import ExitStack

_SHARED = _ROBUST = 1
#: Bytes for the attributes of a mutex; every libc needs less. The mutex itself has a page.
_ATTRIBUTES = 64


class LifelineError(Exception):
    """The host has no robust mutexes, or no thread left; the text says why."""


class Lifeline:
    """The VM's side. ``fd`` is for the guard: see :class:`Listener`. Any thread."""

    def __init__(self) -> None:
        """Raises LifelineError or OSError."""
        self._over = threading.Event()
        self._held = threading.Event()
        self._failure = 0
        self._thread = threading.Thread(target=self._hold, name="lifeline", daemon=True)
        self.fd = os.memfd_create("lifeline", os.MFD_CLOEXEC)
        with ExitStack() as undo:
            undo.callback(os.close, self.fd)
            os.ftruncate(self.fd, mmap.PAGESIZE)
            self._mutex = _Mutex(self.fd)
            undo.callback(self._mutex.close)
            self._mutex.make()
            try:
                self._thread.start()
            except RuntimeError as error:
                raise LifelineError(str(error)) from error
            self._held.wait()
            if self._failure:
                raise LifelineError(os.strerror(self._failure))
            undo.pop_all()

    def release(self) -> None:
        """Let go without dying: the guard hears nothing. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._over.set()
            self._thread.join(2.0)
            if not self._thread.is_alive():
                self._mutex.close()

    def _hold(self) -> None:
        self._failure = self._mutex.lock()
        self._held.set()
        self._over.wait()
        self._mutex.unlock()


class Listener:
    """The guard's side, by the descriptor of the lifeline, which is taken over."""

    def __init__(self, fd: int) -> None:
        self._mutex = _Mutex(fd)
        os.close(fd)

    def wait(self) -> bool:
        """Wait for the end of the thread that holds the lifeline; once, on a thread for nothing else.

        True when it died holding it, False when it let go.
        """
        result = self._mutex.lock()
        self._mutex.unlock()
        self._mutex.close()
        return result in (errno.EOWNERDEAD, errno.ENOTRECOVERABLE)


class _Mutex:
    """A pthread mutex of the libc in the page behind ``fd``; the calls give an errno or 0."""

    def __init__(self, fd: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._page = mmap.mmap(fd, mmap.PAGESIZE)
        # The address only: an object that exports the page is freed by the thread that made it, in a Python
        # without a GIL, and that may be asleep when another one unmaps the page.
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._cell: ctypes.c_void_p | None = ctypes.c_void_p(address)

    def make(self) -> None:
        attributes = ctypes.create_string_buffer(_ATTRIBUTES)
        for name, *values in (
            ("mutexattr_init",),
            ("mutexattr_setpshared", _SHARED),
            ("mutexattr_setrobust", _ROBUST),
        ):
            self._must(name, attributes, *values)
        self._must("mutex_init", self._cell, attributes)

    def lock(self) -> int:
        return int(self._libc.pthread_mutex_lock(self._cell))

    def unlock(self) -> int:
        return int(self._libc.pthread_mutex_unlock(self._cell))

    def close(self) -> None:
        """Unmap it. Who holds a robust mutex must not: the kernel looks at it there."""
        self._cell = None
        self._page.close()

    def _must(self, name: str, *arguments: object) -> None:
        try:
            number = getattr(self._libc, f"pthread_{name}")(*arguments)
        except AttributeError:
            raise LifelineError(f"the host's libc has no pthread_{name}") from None
        if number:
            raise LifelineError(f"pthread_{name}: {os.strerror(number)}")
