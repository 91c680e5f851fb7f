"""Requests a second of the device alone: ``python plugins/virtio_blk/tests/bench_requests.py [SECONDS]``.

A ring full of three-descriptor chains is offered again and again, so what is measured is the
device's side: pop, parse, copy, status, push, notify. One thread, one core.
"""

from __future__ import annotations

import argparse
import time

from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IN, OUT, header

from qvmcore.testing.driver import MmioDriver, RingDriver
from qvmcore.testing.fakes import plug

CHAINS, BLOCK = 64, 4096
NEXT, WRITE = 1, 2


def _fill(ring: RingDriver, kind: int, disk_blocks: int) -> None:
    """CHAINS requests in the descriptor table, and every entry of the available ring names one."""
    for chain in range(CHAINS):
        head = 3 * chain
        sector = chain * 7919 % disk_blocks * (BLOCK // 512)
        ring.write_desc(head, ring.ram.put(header(kind, sector)), 16, NEXT, head + 1)
        ring.write_desc(head + 1, ring.ram.alloc(BLOCK), BLOCK, NEXT | (WRITE if kind == IN else 0), head + 2)
        ring.write_desc(head + 2, ring.ram.alloc(1), 1, WRITE)
    for slot in range(ring.size):
        ring.offer(3 * (slot % CHAINS))


def measure(kind: int, seconds: float, hostdev: str) -> float:
    """Requests a second of one kind: IN or OUT."""
    with plug(VirtioBlk, hostdev=hostdev) as device:
        driver = MmioDriver.of(device)
        driver.start()
        device.settle()
        _fill(driver.queues[0], kind, driver.config(0, 8) * 512 // BLOCK)
        queue = device.vdev.virtio.queue(0)
        assert queue is not None
        index = served = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(50):
                index += CHAINS
                driver.queues[0].publish(index)
                device.vdev.handle_queue(0, queue)
                queue.notify()
            served += 50 * CHAINS
        took = time.perf_counter() - started
        status = device.vdev.status()
        assert status["errors"] == 0
        assert status["reads" if kind == IN else "writes"] == served
        return served / took


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=2.0)
    parser.add_argument("--hostdev", default="memory:16M")
    arguments = parser.parse_args()
    for kind, name in ((IN, "read"), (OUT, "write")):
        rate = measure(kind, arguments.seconds, arguments.hostdev)
        print(f"{name:5} {rate:9,.0f} requests/s of {BLOCK} bytes ({rate * BLOCK / 1e6:,.0f} MB/s)")


if __name__ == "__main__":
    main()
