"""Hold a vdev's worker thread still while the device is taken away from the driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qvmcore.events import Worker


@contextmanager
def parked(worker: Worker, timeout: float) -> Iterator[bool]:
    """Wait until ``worker`` has left whatever it runs and hold it there for the ``with`` block.

    Gives True when the worker is idle, False when it did not come within ``timeout`` seconds; it
    is then not held, and a late one passes by. In a callback of the worker there is nothing to hold,
    and with no thread running nobody comes any more.
    """
    if worker.ident == threading.get_ident():
        yield True
        return
    if not worker.alive:
        yield worker.without_visitor(timeout)
        return
    here, release = threading.Event(), threading.Event()

    def hold() -> None:
        here.set()
        release.wait()

    worker.call(hold)
    try:
        yield here.wait(timeout)
    finally:
        release.set()
