"""How long one side is held back for the other, and the timer that ends it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from qvmcore.api import Worker

#: Seconds the host is held back for a driver without buffers, or a driver for a host without room.
PATIENCE = 1.0


def after_patience(worker: Worker, method: Callable[[Worker], None]) -> None:
    """Call a bound method in PATIENCE seconds, unless its object is gone by then.

    The timer does not keep the object: it holds guest memory of a driver that may be reset.
    """
    reference = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found(worker)

    worker.call_later(PATIENCE, call)
