"""A queue whose guest memory is mapped anew at the same guest-physical addresses (SET_MEM_TABLE)."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

from qvmcore.errors import BadDescriptorChain, GuestError, GuestMemoryError
from qvmcore.memory import GuestMemory, MemoryRegion
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, RingDriver, SplitDriver
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.inflight import Taken
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup

IN_ORDER, PACKED = 1 << spec.VIRTIO_F_IN_ORDER, 1 << spec.VIRTIO_F_RING_PACKED
START, HALF, SIZE = 0x8000_0000, 1 << 19, 8


class NoAccount:
    """A tracker that knows of some chains and notes nothing."""

    def __init__(self, position: int | None = None, left: tuple[Taken, ...] = ()) -> None:
        self._begin = position, left

    def recover(self, position: int, ring: memoryview) -> tuple[int, tuple[Taken, ...]]:
        begin, left = self._begin
        return position if begin is None else begin, left

    def take(self, head: int, descriptors: Any) -> int:
        return head

    def untake(self, entry: int) -> None:
        pass

    def giving(self, entries: Any) -> None:
        pass

    given = giving


class Bench:
    """The driver keeps its mapping; the device's changes. Rings are in the lower half."""

    def __init__(self, features: int, tracker: NoAccount | None = None) -> None:
        self.features = features
        whole = MemoryRegion(MemorySpec(START, 2 * HALF))
        self.file = whole.fd
        self.driver: RingDriver = (PackedDriver if features & PACKED else SplitDriver)(
            GuestRam(GuestMemory([whole]), START, HALF), SIZE, features
        )
        self.upper = GuestRam(self.driver.memory, START + HALF, HALF)
        self.memory = GuestMemory([self.map(START, 2 * HALF)])
        self.setup = QueueSetup(SIZE)
        self.setup.desc, self.setup.driver, self.setup.device = (
            self.driver.desc, self.driver.avail, self.driver.used,
        )  # fmt: skip
        self.interrupts = 0
        self.make(tracker)

    def make(self, tracker: NoAccount | None) -> None:
        self.setup.enable(self.memory, self.features)
        calls = (self.interrupt, lambda error: None, lambda: None)
        self.queue: Virtqueue = self.setup.make(0, self.memory, self.features, *calls, inflight=tracker)

    def interrupt(self) -> None:
        self.interrupts += 1

    def map(self, start: int, size: int, writable: bool = True) -> MemoryRegion:
        return MemoryRegion.adopt(start, size, os.dup(self.file), start - START, writable=writable)

    def move(self, *regions: MemoryRegion) -> tuple[MemoryRegion, ...]:
        """Replace the regions; the old ones."""
        old = self.memory.regions
        self.memory.replace(regions)
        self.setup.rebind(self.memory, self.queue)
        return old

    def popped(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def serve(self) -> None:
        request = self.driver.submit([b"ping"], [4])
        chain = self.popped()
        chain.write(chain.read()[::-1])
        self.queue.push(chain)
        self.queue.notify()
        assert self.driver.reap() == [request]
        assert request.result() == b"gnip"


KINDS = [0, PACKED, IN_ORDER, PACKED | IN_ORDER]
KIND_NAMES = ["split", "packed", "split-in-order", "packed-in-order"]


@pytest.fixture(params=[(kind, tracked) for kind in KINDS for tracked in (False, True)])
def bench(request: pytest.FixtureRequest) -> Bench:
    features, tracked = request.param
    return Bench(features, NoAccount() if tracked else None)


def test_it_goes_on_where_it_was(bench: Bench) -> None:
    for _ in range(5):
        bench.serve()
    position = bench.queue.position
    for regions in ([(START, HALF)], [(START, HALF), (START + HALF, HALF)], [(START, 2 * HALF)]):
        bench.move(*(bench.map(*each) for each in regions))
        assert bench.queue.position == position
        for _ in range(5):
            bench.serve()
        position = bench.queue.position
    assert bench.queue.counters()["pushed"] == 20


def test_nothing_keeps_the_old_memory(bench: Bench) -> None:
    """A region can be unmapped only when no view of it is left."""
    bench.serve()
    (old,) = bench.move(bench.map(START, 2 * HALF))
    old.close()
    assert old._map.closed
    bench.serve()


def test_a_device_that_ended_keeps_no_memory(bench: Bench) -> None:
    bench.serve()
    (old,) = bench.memory.regions
    del bench.queue
    old.close()
    assert old._map.closed


def test_chains_in_hand_are_given_back_in_the_new_memory(bench: Bench) -> None:
    requests = [bench.driver.submit([b"x"], [4]) for _ in range(3)]
    chains = [bench.popped() for _ in requests]
    bench.move(bench.map(START, 2 * HALF))
    assert bench.queue.in_hand == 3
    for chain in chains:
        # Its views are of the old mapping: the same bytes as long as they are of the same file.
        chain.write(b"done")
        bench.queue.push(chain)
    bench.queue.notify()
    assert bench.driver.reap() == requests
    assert [request.result() for request in requests] == [b"done"] * 3
    assert bench.interrupts > 0


def test_buffers_are_looked_up_in_the_new_regions(bench: Bench) -> None:
    bench.move(bench.map(START, HALF))
    address = bench.upper.put(b"gone")
    bench.driver.write_desc(0, address, 4)
    bench.driver.offer(0)
    bench.driver.publish()
    with pytest.raises(BadDescriptorChain, match="is not guest memory"):
        bench.queue.pop()


def test_read_only_regions_are_those_of_the_new_memory(bench: Bench) -> None:
    bench.move(bench.map(START, HALF), bench.map(START + HALF, HALF, writable=False))
    bench.driver.write_desc(0, bench.upper.alloc(4), 4, spec.VIRTQ_DESC_F_WRITE)
    bench.driver.offer(0)
    bench.driver.publish()
    with pytest.raises(BadDescriptorChain, match="is read-only memory"):
        bench.queue.pop()


def test_rings_that_are_gone_are_an_error_and_change_nothing(bench: Bench) -> None:
    bench.serve()
    old = bench.memory.regions
    bench.memory.replace([bench.map(START + HALF, HALF)])
    with pytest.raises(GuestMemoryError):
        bench.setup.rebind(bench.memory, bench.queue)
    bench.memory.replace([])
    with pytest.raises(GuestError):
        bench.setup.rebind(bench.memory, bench.queue)
    bench.memory.replace(old)
    bench.serve()


@pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])
def test_what_an_earlier_device_left_is_looked_up_in_the_new_regions(features: int) -> None:
    bench = Bench(features)
    requests = [bench.driver.submit([bytes([number])], [4]) for number in range(3)]
    left = []
    for number in range(3):
        chain = bench.popped()
        slots = range(2 * number, 2 * number + 2) if features else ()
        rows = [bench.driver.read_slot(slot) for slot in slots]  # type: ignore[attr-defined]
        left.append(Taken(chain.head, rows))
        del chain
    bench.make(NoAccount(bench.queue.position, tuple(left)))
    bench.queue.push(bench.popped())
    (old,) = bench.move(bench.map(START, HALF))
    # The first device and its newest chain refer to each other.
    gc.collect()
    old.close()
    assert old._map.closed
    second, third = bench.popped(), bench.popped()
    assert (second.read(), third.read()) == (b"\1", b"\2")
    bench.queue.push(third)
    bench.queue.push(second)
    assert bench.driver.reap() == [requests[0], requests[2], requests[1]]
