"""How fast is the ring? 4 KiB reads through the real queue, and one access through the bus.

    python tests/bench/ring.py [--json] [--seconds 2]

The device is the virtio-blk plugin on a host file in memory when it is installed, and a disk of
three descriptors and a memcpy otherwise (``--builtin`` forces that one). ``queue`` is the queue and
the handler alone, on one thread; ``device`` is the way through the notify register, the doorbell
and the worker thread, interrupt and acknowledgement included. The driver's work is in both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvmcore.bus import AddressSpace
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.ring import SplitDriver
from qvmcore.types import MmioHandler, Window
from qvmcore.virtio import spec
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.queue import Virtqueue

DEPTH, BLOCK, DISK = 32, 4096, 1 << 20
HEADER = struct.Struct("<IIQ")
WRITE = spec.VIRTQ_DESC_F_WRITE


class MemoryDisk(VirtioVdev):
    """Answers read requests from a buffer; as little as a block device can do."""

    vdev_type = "memory-disk"
    device_id = 2
    queue_sizes = (256,)

    def on_configured(self) -> None:
        self._disk = memoryview(bytearray(DISK))

    def config_space(self) -> bytes:
        return (DISK // 512).to_bytes(8, "little")

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        disk = self._disk
        for chain in queue:
            _, _, sector = HEADER.unpack(chain.read(HEADER.size))
            position = start = sector * 512
            for view in chain.room(1):
                end = position + len(view)
                view[:] = disk[position:end]
                position = end
            chain.write_tail(b"\0")
            queue.push(chain, position - start + 1)


class Feeder:
    """A driver that offers the same ``DEPTH`` requests again and again, at next to no cost."""

    def __init__(self, ring: SplitDriver) -> None:
        self._ring = ring
        self._avail = ring.memory.view(ring.avail, 6 + 2 * ring.size).cast("H")
        self._used = ring.memory.view(ring.used, 6 + 8 * ring.size).cast("H")
        self._mask = ring.size - 1
        self._index = 0
        self._heads: list[int] = []
        for number in range(DEPTH):
            header = ring.ram.put(HEADER.pack(0, 0, number * BLOCK // 512))
            data, status = ring.ram.alloc(BLOCK), ring.ram.alloc(1)
            first = 3 * number
            ring.write_desc(first, header, HEADER.size, spec.VIRTQ_DESC_F_NEXT, first + 1)
            ring.write_desc(first + 1, data, BLOCK, WRITE | spec.VIRTQ_DESC_F_NEXT, first + 2)
            ring.write_desc(first + 2, status, 1, WRITE)
            self._heads.append(first)

    def offer(self) -> None:
        """All of them."""
        avail, mask, index = self._avail, self._mask, self._index
        for head in self._heads:
            avail[2 + (index & mask)] = head
            index += 1
        self._index = index
        avail[1] = index & 0xFFFF

    @property
    def done(self) -> bool:
        """Whether all came back."""
        return self._used[1] == self._index & 0xFFFF


def disk(builtin: bool) -> Plugged[Any]:
    """The virtio-blk plugin if it is here."""
    if not builtin:
        try:
            (cls,) = importlib.import_module("qvm_virtio_blk").qvm_vdev_types()
        except ImportError:
            print("virtio-blk is not installed; using the built-in disk", file=sys.stderr)
        else:
            fd = os.memfd_create("bench-disk")
            os.ftruncate(fd, DISK)
            return plug(cls, hostdev=f"/proc/self/fd/{fd}")
    return plug(MemoryDisk)


def bring_up(device: Plugged[Any]) -> tuple[MmioDriver, Feeder]:
    """A driver that has done 3.1.1, with EVENT_IDX."""
    driver = MmioDriver.of(device)
    driver.start(1 << spec.VIRTIO_F_VERSION_1 | 1 << spec.VIRTIO_F_EVENT_IDX)
    device.settle()
    # A device may have changed its configuration at the activation; its interrupt is not counted.
    driver.ack()
    return driver, Feeder(driver.queues[0])


def rate(batch: Callable[[], None], seconds: float) -> float:
    """Requests a second: the best of five runs, because other load only ever makes it slower."""
    batch()
    best = 0.0
    for _ in range(5):
        count, started = 0, time.perf_counter()
        end = started + seconds / 5
        while time.perf_counter() < end:
            for _ in range(16):
                batch()
            count += 16 * DEPTH
        best = max(best, count / (time.perf_counter() - started))
    return best


def queue_rate(device: Plugged[Any], seconds: float) -> float:
    """The queue and the handler on this thread."""
    _, feeder = bring_up(device)
    queue = device.vdev.virtio.queue(0)
    handle = device.vdev.handle_queue

    def batch() -> None:
        feeder.offer()
        handle(0, queue)
        queue.notify()

    return rate(batch, seconds)


def device_rate(device: Plugged[Any], seconds: float) -> float:
    """Through the notify register, the worker and the interrupt."""
    driver, feeder = bring_up(device)
    ring, line = driver.queues[0], device.irq

    def batch() -> None:
        ring.set_used_event((feeder._index + DEPTH - 1) & 0xFFFF)
        feeder.offer()
        seen = line.count
        driver.notify(0)
        assert line.wait(seen + 1)
        assert feeder.done
        driver.ack(1)

    return rate(batch, seconds)


def bus_microseconds(windows: int = 64, accesses: int = 200_000) -> tuple[float, float]:
    """One 4-byte read and one write through a bus with that many windows."""
    bus = AddressSpace()
    handler = MmioHandler(lambda offset, size: 0, lambda offset, size, value: None)
    for number in range(windows):
        bus.insert(0x1000_0000 + number * 0x1000, Window(0x200), handler, f"w{number}")
    bus.freeze()
    places = [0x1000_0000 + (number * 37 % windows) * 0x1000 + 0x50 for number in range(accesses)]
    read, write = bus.read, bus.write
    started = time.perf_counter()
    for place in places:
        read(place, 4)
    middle = time.perf_counter()
    for place in places:
        write(place, 4, 0)
    end = time.perf_counter()
    return (middle - started) / accesses * 1e6, (end - middle) / accesses * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--builtin", action="store_true", help="do not use the virtio-blk plugin")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement")
    arguments = parser.parse_args()
    with disk(arguments.builtin) as device:
        kind = device.vdev.vdev_type
        on_queue = queue_rate(device, arguments.seconds)
        on_device = device_rate(device, arguments.seconds)
    read, write = bus_microseconds()
    results: dict[str, object] = {
        "device": kind,
        "depth": DEPTH,
        "bytes": BLOCK,
        "queue_requests_per_second": round(on_queue),
        "device_requests_per_second": round(on_device),
        "bus_read_us": round(read, 3),
        "bus_write_us": round(write, 3),
    }
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"4 KiB reads, depth {DEPTH}, {kind} ({Path(sys.executable).name}, {os.cpu_count()} CPUs)")
    print(f"  queue and handler, one thread   {on_queue:12,.0f} requests/s  {1e6 / on_queue:6.2f} us each")
    print(f"  register, worker and interrupt  {on_device:12,.0f} requests/s  {1e6 / on_device:6.2f} us each")
    print(f"  bus, 64 windows                 {read:12.2f} us a read   {write:6.2f} us a write")


if __name__ == "__main__":
    main()
