"""Several chains given back at once: a driver that polls sees all of them or none (5.1.9.4.1)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from qvmcore.memory import GuestMemory
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, RingDriver, SplitDriver
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup

IN_ORDER, PACKED = 1 << spec.VIRTIO_F_IN_ORDER, 1 << spec.VIRTIO_F_RING_PACKED
SIZE = 8


class Bench:
    """A driver and a device at the two ends of one ring."""

    def __init__(self, features: int) -> None:
        memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 20)])
        self.driver: RingDriver = (PackedDriver if features & PACKED else SplitDriver)(
            GuestRam(memory), SIZE, features
        )
        setup = QueueSetup(SIZE)
        setup.desc, setup.driver, setup.device = self.driver.desc, self.driver.avail, self.driver.used
        setup.enable(memory, features)
        self.queue: Virtqueue = setup.make(
            0, memory, features, lambda: None, lambda error: None, lambda: None
        )

    def popped(self, count: int) -> list[Chain]:
        """So many chains."""
        chains = [self.queue.pop() for _ in range(count)]
        assert None not in chains
        return [chain for chain in chains if chain is not None]

    def watch(self, look: Callable[[], None]) -> None:
        """Have ``look()`` called after each store to the used ring."""
        ring: Any = getattr(self.queue, "_ring", self.queue)
        for name in ("_used", "_elements") if isinstance(self.driver, SplitDriver) else ("_used_cells",):
            setattr(ring, name, Watched(getattr(ring, name), look))


class Watched:
    """Cells of guest memory."""

    def __init__(self, cells: Any, look: Callable[[], None]) -> None:
        self._cells = cells
        self._look = look

    def __getitem__(self, index: int) -> int:
        return int(self._cells[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._cells[index] = value
        self._look()


@pytest.fixture(params=[0, PACKED, IN_ORDER, PACKED | IN_ORDER], ids=["split", "packed", "ordered", "both"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_5_1_9_4_1_all_are_seen_or_none(bench: Bench) -> None:
    """Also across the end of the ring."""
    seen: list[Any] = []
    bench.watch(lambda: seen.extend(bench.driver.reap()))
    counts: list[int] = []
    bench.watch(lambda: counts.append(len(seen)))
    for lap in range(2 * SIZE):
        requests = [bench.driver.add([], [4]) for _ in range(3)]
        bench.driver.kick()
        chains = bench.popped(3)
        seen.clear()
        counts.clear()
        bench.queue.push_together([(chain, lap % 4 + number % 2) for number, chain in enumerate(chains)])
        assert set(counts) <= {0, 3}
        assert seen == requests
        assert [request.length for request in requests] == [lap % 4, lap % 4 + 1, lap % 4]
        bench.queue.notify()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_6_2_in_any_order_and_behind_others(bench: Bench, order: tuple[int, ...]) -> None:
    requests = [bench.driver.submit([], [4]) for _ in range(4)]
    first, *chains = bench.popped(4)
    bench.queue.push_together([(chains[number], number) for number in order])
    bench.queue.push(first, 4)
    back = bench.driver.reap()
    assert {request.head for request in back} == {request.head for request in requests}
    assert [request.length for request in requests] == [4, 0, 1, 2]


def test_nothing_is_nothing(bench: Bench) -> None:
    bench.queue.push_together([])
    assert bench.driver.reap() == []


def test_bugs_of_the_device_are_told(bench: Bench) -> None:
    for _ in range(3):
        bench.driver.submit([], [4])
    one, two, _ = bench.popped(3)
    with pytest.raises(ValueError, match="bytes written of 4 writable"):
        bench.queue.push_together([(one, 5)])
    bench.queue.push_together([(one, 4)])
    with pytest.raises(ValueError, match="pushed twice"):
        bench.queue.push_together([(one, 4)])
    with pytest.raises(ValueError, match="pushed twice"):
        bench.queue.push_together([(two, 1), (two, 1)])


def test_a_dead_queue_is_silent(bench: Bench) -> None:
    for _ in range(2):
        bench.driver.submit([], [4])
    chains = bench.popped(2)
    stores: list[None] = []
    bench.watch(lambda: stores.append(None))
    bench.queue.kill()
    bench.queue.push_together([(chain, 4) for chain in chains])
    assert stores == []
    assert bench.driver.reap() == []
