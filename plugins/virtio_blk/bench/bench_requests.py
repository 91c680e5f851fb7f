"""Requests a second of the device alone: ``python plugins/virtio_blk/bench/bench_requests.py [SECONDS]``.

A ready ring of three-descriptor chains is offered again and again, so what is measured is the
device's side: pop, parse, copy, status, push. One thread, one core.
"""

from __future__ import annotations

import argparse
import logging
import struct
import time
from pathlib import Path

from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.options import BlkOptions

from qvmcore.api import GuestMemory, MemoryRegion
from qvmcore.types import MemorySpec
from qvmcore.virtio.split import SplitQueue, SplitRings

RAM, SIZE, CHAINS, BLOCK = 0x4000_0000, 256, 64, 4096
DESC, AVAIL, USED, HEADERS, DATA = RAM, RAM + 0x2000, RAM + 0x3000, RAM + 0x4000, RAM + 0x10000


class _Context:
    """As little of a VdevContext as the device uses."""

    name = "bench"
    base_dir = Path()
    log = logging.LoggerAdapter(logging.getLogger("bench"), {})

    def on_terminate(self, run: object, *, phase: object, deadline: float = 1.0) -> None:
        """The bench has no orderly end."""


def _ring(memory: GuestMemory, kind: int, disk_blocks: int) -> SplitQueue:
    write = 2
    for chain in range(CHAINS):
        head, header = 3 * chain, HEADERS + 32 * chain
        memory.write(header, struct.pack("<IIQ", kind, 0, (chain * 7919 % disk_blocks) * (BLOCK // 512)))
        data_flags = 1 | (write if kind == 0 else 0)
        for index, (address, length, flags, following) in enumerate(
            (
                (header, 16, 1, head + 1),
                (DATA + BLOCK * chain, BLOCK, data_flags, head + 2),
                (header + 16, 1, write, 0),
            )
        ):
            memory.write(DESC + 16 * (head + index), struct.pack("<QIHH", address, length, flags, following))
    for slot in range(SIZE):
        memory.write(AVAIL + 4 + 2 * slot, struct.pack("<H", 3 * (slot % CHAINS)))
    rings = SplitRings(memory, SIZE, DESC, AVAIL, USED)
    return SplitQueue(0, rings, memory, 1 << 32 | 1 << 29, lambda: None, lambda error: None)


def measure(kind: int, seconds: float, hostdev: str) -> float:
    """Requests a second of one kind: 0 read, 1 write."""
    memory = GuestMemory([MemoryRegion(MemorySpec(RAM, 0x100000))])
    device = VirtioBlk(_Context(), BlkOptions(hostdev=hostdev))  # type: ignore[arg-type]
    device.on_configured()
    device.on_activate(0xFFFFFFFF)
    queue = _ring(memory, kind, 4096)
    index = memory.view(AVAIL, 4).cast("H")
    served, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(50):
            index[1] = (index[1] + CHAINS) & 0xFFFF
            device.handle_queue(0, queue)
            queue.notify()
            served += CHAINS
    took = time.perf_counter() - started
    assert device.status()["errors"] == 0
    return served / took


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=2.0)
    parser.add_argument("--hostdev", default="memory:16M")
    arguments = parser.parse_args()
    for kind, name in ((0, "read"), (1, "write")):
        rate = measure(kind, arguments.seconds, arguments.hostdev)
        print(f"{name:5} {rate:9,.0f} requests/s of {BLOCK} bytes ({rate * BLOCK / 1e6:,.0f} MB/s)")


if __name__ == "__main__":
    main()
