"""How fast are the rings? 4 KiB reads through the real queues, and one access through the bus.

    python tests/bench/ring.py [--json] [--seconds 2]

The device is the virtio-blk plugin on a host file in memory when it is installed, and a disk of
three descriptors and a memcpy otherwise (``--builtin`` forces that one). ``queue`` is the queue and
the handler alone, in CPU time of one thread, so that other load on the host does not count;
``device`` is the way through the notify register, the doorbell and the worker thread, interrupt and
acknowledgement included, in wall time. The driver's work is in both. Split and packed take turns.
"""

from __future__ import annotations

import abc
import argparse
import importlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qvmcore.bus import AddressSpace
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.ring import RingDriver
from qvmcore.types import MmioHandler, Window
from qvmcore.virtio import spec
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.queue import Virtqueue

DEPTH, BLOCK, DISK = 32, 4096, 1 << 20
HEADER = struct.Struct("<IIQ")
NEXT, WRITE = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE


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


class Feeder(abc.ABC):
    """A driver that offers the same ``DEPTH`` requests again and again, at next to no cost."""

    def __init__(self, ring: RingDriver) -> None:
        self.ring = ring
        self.chains = [
            (
                (ring.ram.put(HEADER.pack(0, 0, number * BLOCK // 512)), HEADER.size, NEXT),
                (ring.ram.alloc(BLOCK), BLOCK, WRITE | NEXT),
                (ring.ram.alloc(1), 1, WRITE),
            )
            for number in range(DEPTH)
        ]

    @abc.abstractmethod
    def offer(self) -> None:
        """All of them, and ask for an interrupt when the last comes back."""

    @property
    @abc.abstractmethod
    def done(self) -> bool:
        """Whether all came back."""


class SplitFeeder(Feeder):
    """Names the same heads again."""

    def __init__(self, ring: RingDriver) -> None:
        super().__init__(ring)
        self._avail = ring.memory.view(ring.avail, 6 + 2 * ring.size).cast("H")
        self._used = ring.memory.view(ring.used, 6 + 8 * ring.size).cast("H")
        self._mask = ring.size - 1
        self._index = 0
        for chain, rows in enumerate(self.chains):
            for place, row in enumerate(rows):
                ring.write_desc(3 * chain + place, *row, 3 * chain + place + 1)

    def offer(self) -> None:
        avail, mask, index = self._avail, self._mask, self._index
        avail[2 + mask + 1] = (index + DEPTH - 1) & 0xFFFF
        for head in range(0, 3 * DEPTH, 3):
            avail[2 + (index & mask)] = head
            index += 1
        self._index = index
        avail[1] = index & 0xFFFF

    @property
    def done(self) -> bool:
        return self._used[1] == self._index & 0xFFFF


class PackedFeeder(Feeder):
    """The ring holds the descriptors of one batch, so each lap writes the same ones with other flags."""

    def __init__(self, ring: RingDriver) -> None:
        super().__init__(ring)
        rows = [(row, chain) for chain, rows in enumerate(self.chains) for row in rows]
        assert ring.size == len(rows)
        self._cells = ring.memory.view(ring.desc, 16 * ring.size).cast("Q")
        self._event = ring.memory.view(ring.avail, 4).cast("I")
        self._laps = [
            [
                word
                for (address, length, flags), chain in rows
                for word in (address, length | chain << 32 | (flags | mark) << 48)
            ]
            for mark in (spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED)
        ]
        self._images = [memoryview(struct.pack(f"<{2 * len(rows)}Q", *lap)).cast("Q") for lap in self._laps]
        self._last = 2 * (len(rows) - 3) + 1
        self._wrap = 1

    def offer(self) -> None:
        wrap = self._wrap
        # Wanted: the last chain's used descriptor.
        self._event[0] = self._last // 2 | wrap << 15 | spec.RING_EVENT_FLAGS_DESC << 16
        self._cells[:] = self._images[1 - wrap]
        self._wrap = 1 - wrap

    @property
    def done(self) -> bool:
        flags = self._cells[self._last] >> 48
        both = spec.VIRTQ_DESC_F_AVAIL | spec.VIRTQ_DESC_F_USED
        return flags & both == (0 if self._wrap else both)


def disk(builtin: bool) -> Plugged[Any]:
    """The virtio-blk plugin if it is here."""
    if not builtin:
        try:
            (cls,) = importlib.import_module("qvm_virtio_blk").qvm_vdev_types()
        except ImportError:
            print("virtio-blk is not installed; using the built-in disk", file=sys.stderr)
        else:
            fd = os.memfd_create("bench-disk")
            try:
                os.ftruncate(fd, DISK)
                return plug(cls, hostdev=f"/proc/self/fd/{fd}")
            finally:
                os.close(fd)
    return plug(MemoryDisk)


def bring_up(device: Plugged[Any], packed: bool) -> tuple[MmioDriver, Feeder]:
    """A driver that has done 3.1.1, with EVENT_IDX."""
    driver = MmioDriver.of(device)
    features = 1 << spec.VIRTIO_F_VERSION_1 | 1 << spec.VIRTIO_F_EVENT_IDX
    size = 3 * DEPTH if packed else 256
    driver.start(features | packed << spec.VIRTIO_F_RING_PACKED, [size])
    device.settle()
    # A device may have changed its configuration at the activation; its interrupt is not counted.
    driver.ack()
    return driver, (PackedFeeder if packed else SplitFeeder)(driver.queues[0])


def rate(batch: Callable[[], None], seconds: float, clock: Callable[[], float]) -> float:
    """Requests a second of ``clock`` for ``seconds``."""
    batch()
    count, started = 0, clock()
    end = started + seconds
    while clock() < end:
        for _ in range(16):
            batch()
        count += 16 * DEPTH
    return count / (clock() - started)


def queue_batch(device: Plugged[Any], packed: bool) -> Callable[[], None]:
    """The queue and the handler on this thread."""
    _, feeder = bring_up(device, packed)
    queue = device.vdev.virtio.queue(0)
    handle = device.vdev.handle_queue

    def batch() -> None:
        feeder.offer()
        handle(0, queue)
        queue.notify()

    batch()
    assert feeder.done
    return batch


def device_batch(device: Plugged[Any], packed: bool) -> Callable[[], None]:
    """Through the notify register, the worker and the interrupt."""
    driver, feeder = bring_up(device, packed)
    line = device.irq

    def batch() -> None:
        feeder.offer()
        seen = line.count
        driver.notify(0)
        assert line.wait(seen + 1)
        assert feeder.done
        driver.ack(1)

    return batch


def compare(builtin: bool, seconds: float) -> tuple[str, dict[str, float]]:
    """The best of five turns each: requests a second by way and ring."""
    best: dict[str, float] = {}
    with ExitStack() as devices:
        for way, make, clock in (
            ("queue", queue_batch, time.thread_time),
            ("device", device_batch, time.perf_counter),
        ):
            pair = [devices.enter_context(disk(builtin)) for _ in range(2)]
            batches = {
                f"{way}_{'packed' if packed else 'split'}": make(device, packed)
                for packed, device in zip((False, True), pair, strict=True)
            }
            for _ in range(5):
                for name, batch in batches.items():
                    best[name] = max(best.get(name, 0.0), rate(batch, seconds / 5, clock))
        return pair[0].vdev.vdev_type, best


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
    kind, best = compare(arguments.builtin, arguments.seconds)
    read, write = bus_microseconds()
    results: dict[str, object] = {
        "device": kind,
        "depth": DEPTH,
        "bytes": BLOCK,
        **{f"{name}_requests_per_second": round(value) for name, value in best.items()},
        "bus_read_us": round(read, 3),
        "bus_write_us": round(write, 3),
    }
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"4 KiB reads, depth {DEPTH}, {kind} ({Path(sys.executable).name}, {os.cpu_count()} CPUs)")
    print("                                      split      packed  requests/s")
    for way, title in (("queue", "queue and handler, CPU time"), ("device", "register, worker, interrupt")):
        split, packed = best[f"{way}_split"], best[f"{way}_packed"]
        print(f"  {title:30} {split:11,.0f} {packed:11,.0f}  packed/split {packed / split:.2f}")
    print(f"  bus, 64 windows: {read:.2f} us a read, {write:.2f} us a write")


if __name__ == "__main__":
    main()
