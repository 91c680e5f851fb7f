"""Does anything grow? A million requests through each ring, and 200 lives of a device.

    python tests/bench/leak.py [--requests 1000000] [--cycles 200]

Requests run through the real queue and the virtio-blk handler (the built-in disk of ring.py without
that plugin); memory is what tracemalloc counts after a warm-up and at the end, garbage collected. A
life is plug, bring-up, requests, reset, bring-up again, end; then file descriptors and threads are
counted. Fails when anything is left.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged

# Beside this file: found when it is run by hand, and by whoever puts this folder on the path.
_ring = importlib.import_module("ring")
DEPTH: int = _ring.DEPTH
disk, queue_batch = _ring.disk, _ring.queue_batch

#: Bytes that may come and go by themselves: a worker in epoll_wait holds room for its answer.
SLACK = 16 << 10
WARM = 200


def growth(batch: Callable[[], None], batches: int) -> int:
    """Bytes allocated by ``batches`` runs and still held after them."""
    for _ in range(WARM):
        batch()
    tracemalloc.start()
    try:
        for _ in range(WARM):
            batch()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(batches):
            batch()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


def live(plugged: Callable[[], Plugged[Any]], packed: bool) -> None:
    """One life of a device."""
    with plugged() as device:
        driver = MmioDriver.of(device)
        driver.packed = packed
        for _ in range(2):
            driver.start()
            for index, ring in enumerate(driver.queues):
                ring.submit([bytes(16)], [512, 1])
                driver.notify(index)
            device.settle()
        if packed:
            driver.reset_queue(0)


def resources() -> tuple[int, int]:
    """Open file descriptors and living threads."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def left(plugged: Callable[[], Plugged[Any]], cycles: int) -> tuple[int, int]:
    """File descriptors and threads that ``cycles`` lives leave behind."""
    live(plugged, False)
    fds, threads = resources()
    for number in range(cycles):
        live(plugged, bool(number % 2))
    now = resources()
    return now[0] - fds, now[1] - threads


def main() -> int:
    """Measure, print, and say whether anything is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=1_000_000, help="through each ring")
    parser.add_argument("--cycles", type=int, default=200, help="lives of a device")
    arguments = parser.parse_args()
    bad = 0
    for packed in (False, True):
        with disk(False) as device:
            grown = growth(queue_batch(device, packed), arguments.requests // DEPTH)
        bad += grown > SLACK
        print(f"{'packed' if packed else 'split':6}  {arguments.requests:,} requests  {grown:+} bytes")
    files, threads = left(lambda: disk(False), arguments.cycles)
    bad += bool(files or threads)
    print(f"{arguments.cycles} lives  {files:+} file descriptors  {threads:+} threads")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
