"""Signals as events (floor 8): handlers only put a name into the machine's queue.

SIGTERM, SIGINT and SIGHUP press the power button, a second one cuts the power; SIGQUIT cuts it at
once; SIGUSR1 logs the status; SIGUSR2 writes a guest dump. SIGPIPE stays ignored as Python sets it.

The queue is looked at when the guest runs. Until then the first request for the end waits, and a second one
gives the start up: a vdev may hang in it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class StartGivenUp(BaseException):
    """The end was asked for twice before the guest ran; raised on the main thread, wherever it is.

    No Exception: what vdevs catch is not for them.
    """


class SignalEvents:
    """Install the handlers while the context lasts; outside the main thread do nothing.

    ``put`` must be safe inside a signal handler, as ``queue.SimpleQueue.put`` is.
    """

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put
        self._previous: dict[signal.Signals, object] = {}
        self._starting = False
        self._requests = 0

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Inside, the second request for the end raises StartGivenUp, and so does each further one."""
        self._starting = True
        try:
            yield
        finally:
            self._starting = False

    def __enter__(self) -> SignalEvents:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal() gave us

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._put(name)
        self._requests += number in _ENDING
        if self._starting and self._requests > 1 and number in _ENDING:
            raise StartGivenUp(f"power cut by a second {name} while the VM was starting")
