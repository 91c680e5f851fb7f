"""Signals as events (floor 8): handlers only put a name into the machine's queue.

SIGTERM, SIGINT and SIGHUP press the power button, a second one cuts the power; SIGQUIT cuts it at
once; SIGUSR1 logs the status; SIGUSR2 writes a guest dump. SIGPIPE stays ignored as Python sets it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class SignalEvents:
    """Install the handlers while the context lasts; outside the main thread do nothing.

    ``put`` must be safe inside a signal handler, as ``queue.SimpleQueue.put`` is.
    """

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put
        self._previous: dict[signal.Signals, object] = {}

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
        self._put(signal.Signals(number).name)
