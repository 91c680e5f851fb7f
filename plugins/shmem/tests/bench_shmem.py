"""Microseconds of shared memory, without a guest: ``python plugins/shmem/tests/bench_shmem.py``.

A store and a load of 8 bytes through the bus, and a notification from one vdev to the interrupt of
another and its status register. Two devices, one process.
"""

from __future__ import annotations

import tempfile
import time

from qvm_shmem.device import Shmem
from shmem_guest import Guest

from qvmcore.testing.fakes import plug

ACCESSES, NOTIFICATIONS, WORDS = 200_000, 5_000, 1024


def main() -> None:
    """Measure once and print."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as directory,
        plug(Shmem, {"directory": directory}) as first,
        plug(Shmem, {"directory": directory}) as second,
    ):
        one, two = Guest(first), Guest(second)
        mine, theirs = one.attach(b"bench", 2), two.attach(b"bench", 2)
        start = time.perf_counter()
        for count in range(ACCESSES):
            one.store(mine + 4096 + 8 * (count % WORDS), count, 8)
        stored = time.perf_counter()
        for count in range(ACCESSES):
            two.load(theirs + 4096 + 8 * (count % WORDS), 8)
        loaded = time.perf_counter()
        for count in range(1, NOTIFICATIONS + 1):
            one.store(mine + 8, 0b10)
            second.irq.wait(count)
            two.load(theirs)
        told = time.perf_counter()
    print(f"store of 8 bytes   {(stored - start) / ACCESSES * 1e6:7.2f} us")
    print(f"load of 8 bytes    {(loaded - stored) / ACCESSES * 1e6:7.2f} us")
    print(f"notify to status   {(told - loaded) / NOTIFICATIONS * 1e6:7.2f} us")


if __name__ == "__main__":
    main()
