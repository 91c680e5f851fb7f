"""Serving a queue on the vCPU that notified, without the way to the worker and back.

Where a notification is a call on a vCPU thread, waking the worker costs two changes of threads, and
the guest goes idle meanwhile; for short work that is more than the work. The device says by
``serve_now`` that it can, and leaves to the worker what would wait. Should it wait after all, the
worker serves the queue for a while: the guest is not at the mercy of a slow disk. And should it hang,
it is interrupted as every register handler is, and the queue is the worker's until the next reset.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from qvmcore.errors import GuestError, VdevHung
from qvmcore.virtio.queue import Virtqueue

#: Chains served at one notification; the worker takes what is left, beside the running guest.
CHAINS = 8
#: Seconds this may take. When it took longer, the worker serves the queue for REST times as long: a
#: vCPU is held up for 5 % of the time at most.
PATIENCE = 0.01
REST = 20.0


def visitor(
    index: int,
    queue_of: Callable[[int], Virtqueue | None],
    serve_now: Callable[[int, Virtqueue], bool],
    needs_reset: Callable[[BaseException], None],
) -> Callable[[], bool]:
    """What a notification of queue ``index`` does as the worker's visitor (``Worker.visit``).

    It gives False when the worker has to serve the queue, or the rest of it. ``queue_of`` gives None
    for a queue that is not to be served now.
    """
    now = time.monotonic
    rest_until = 0.0

    def serve() -> bool:
        nonlocal rest_until
        queue = queue_of(index)
        if queue is None:
            return True
        began = now()
        if began < rest_until:
            return False
        queue.limit(CHAINS)
        try:
            return serve_now(index, queue)
        except GuestError as error:
            needs_reset(error)
            return True
        except VdevHung:
            # No fault of the device: it may have sat in one system call, and has come back by now.
            rest_until = math.inf
            return False
        finally:
            queue.notify()
            took = now() - began
            if took > PATIENCE:
                rest_until = max(rest_until, began + REST * took)

    return serve
