"""Opening a disk late: when the guest's driver first touches it, again and again until it works."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from qvmcore.api import HostError, Worker

#: Seconds between two attempts.
RETRY = 1.0
#: Seconds between two looks at an attempt that is still under way.
_LOOK = 0.02
#: Seconds a driver's first touch waits for the disk, so that its first look at the capacity finds it.
FIRST_WAIT = 0.1


class LateOpen:
    """Calls ``attempt`` on the worker, from the driver's touch on, for ``seconds`` (None: for ever).

    ``attempt()`` gives True when the disk is open, False while it is still being opened, and raises
    HostError when that failed. A driver that starts anew after the time was over starts the time anew.
    """

    def __init__(
        self,
        worker: Worker,
        attempt: Callable[[], bool],
        seconds: float | None,
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self._worker = worker
        self._attempt = attempt
        self._seconds = seconds
        self._log = log
        self._lock = threading.Lock()
        self._trying = self._open = False
        self._until = 0.0
        self._decided = threading.Event()
        self._said = ""

    def touch(self) -> None:
        """The driver is there. Any thread; returns within FIRST_WAIT seconds."""
        with self._lock:
            if self._open:
                return
            if not self._trying:
                self._trying = True
                self._decided.clear()
                self._until = time.monotonic() + (self._seconds or 0)
                self._worker.call(self._try)
        self._decided.wait(FIRST_WAIT)

    def _try(self) -> None:
        try:
            if not self._attempt():
                self._worker.call_later(_LOOK, self._try)
                return
            failure = None
        except HostError as error:
            failure = error
        with self._lock:
            self._open = failure is None
            again = failure is not None and (self._seconds is None or time.monotonic() < self._until)
            self._trying = again
        if failure is not None and not again:
            self._log.error("the disk stays closed: %s", failure)
        elif failure is not None and str(failure) != self._said:
            self._said = str(failure)
            self._log.warning("not open yet, trying again: %s", failure)
        self._decided.set()
        if again:
            self._worker.call_later(RETRY, self._try)
