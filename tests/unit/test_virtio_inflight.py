"""A tracked queue: what it tells its tracker, when, and what it makes of what an earlier device left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import GuestMemory
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, Request, RingDriver, SplitDriver
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.in_order import InOrderQueue
from qvmcore.virtio.inflight import Taken
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup
from qvmcore.virtio.tracked import TrackedQueue

IN_ORDER, PACKED = 1 << spec.VIRTIO_F_IN_ORDER, 1 << spec.VIRTIO_F_RING_PACKED
SIZE = 8


class Diary:
    """A tracker that writes down what it is told, and how many chains the driver had back then."""

    def __init__(self, bench: Bench, begin: int | None, left: Sequence[Taken]) -> None:
        self._bench = bench
        self._recovered = begin, left
        self.lines: list[tuple[Any, ...]] = []
        self.rows: list[Sequence[tuple[int, int, int, int]]] = []
        self._next = 100
        self.on_giving = lambda: None

    def recover(self, position: int, ring: memoryview) -> tuple[int, Sequence[Taken]]:
        begin, left = self._recovered
        self.lines.append(("recover", position, len(ring)))
        return position if begin is None else begin, left

    def take(self, head: int, descriptors: Sequence[tuple[int, int, int, int]]) -> int:
        self._next += 1
        self.lines.append(("take", head, self._next))
        self.rows.append(descriptors)
        return self._next

    def untake(self, entry: int) -> None:
        self.lines.append(("untake", entry))

    def giving(self, entries: Sequence[int]) -> None:
        self.lines.append(("giving", *entries, self._bench.driver.used_idx))
        self.on_giving()

    def given(self, entries: Sequence[int]) -> None:
        self.lines.append(("given", *entries, self._bench.driver.used_idx))


class Bench:
    """A driver, and devices one after another."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.packed = bool(features & PACKED)
        self.memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 20)])
        self.driver: RingDriver = (PackedDriver if self.packed else SplitDriver)(
            GuestRam(self.memory), SIZE, features
        )
        self.interrupts = self.returns = 0
        self.errors: list[BaseException] = []
        self.device()

    def device(self, begin: int | None = None, left: Sequence[Taken] = ()) -> None:
        setup = QueueSetup(SIZE)
        setup.desc, setup.driver, setup.device = self.driver.desc, self.driver.avail, self.driver.used
        setup.enable(self.memory, self.features)
        self.diary = Diary(self, begin, left)
        calls = (self.interrupt, self.errors.append, self.again)
        self.queue: Virtqueue = setup.make(0, self.memory, self.features, *calls, inflight=self.diary)

    def interrupt(self) -> None:
        self.interrupts += 1

    def again(self) -> None:
        self.returns += 1

    def offer(self, count: int) -> list[Request]:
        return [self.driver.submit([bytes([number])], [1]) for number in range(count)]

    def popped(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def crash(self, count: int) -> list[Request]:
        """A device takes so many chains and is no more; the next one is told of them."""
        requests = self.offer(count)
        left = []
        for number in range(count):
            chain = self.popped()
            # On a split ring the entry is the head.
            left.append(Taken(40 + number if self.packed else chain.head, self.diary.rows[-1]))
            assert chain.head == requests[number].head
        self.device(self.queue.position, left)
        return requests


@pytest.fixture(params=[0, PACKED], ids=["split", "packed"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_a_chain_is_noted_before_the_device_sees_it_and_around_the_rings_stores(bench: Bench) -> None:
    one, two = bench.offer(2)
    first, second = bench.popped(), bench.popped()
    bench.queue.push(second)
    bench.queue.push(first)
    assert bench.diary.lines[1:] == [
        ("take", one.head, 101), ("take", two.head, 102),
        ("giving", 102, 0), ("given", 102, 1),
        ("giving", 101, 1), ("given", 101, 2),
    ]  # fmt: skip


def test_a_batch_is_noted_as_one(bench: Bench) -> None:
    bench.offer(3)
    chains = [bench.popped() for _ in range(3)]
    bench.queue.push_together([(chain, 0) for chain in reversed(chains)])
    assert bench.diary.lines[-2:] == [("giving", 103, 102, 101, 0), ("given", 103, 102, 101, 3)]
    bench.queue.push_together([])
    assert len(bench.diary.lines) == 6


def test_the_descriptors_of_a_packed_chain_are_noted_and_of_a_split_one_not(bench: Bench) -> None:
    for _ in range(5):
        bench.offer(1)
        bench.queue.push(bench.popped())
        bench.driver.reap()
    expected: list[list[tuple[int, int, int, int]]] = [[]] * 5
    if isinstance(bench.driver, PackedDriver):
        assert [len(rows) for rows in bench.diary.rows] == [2] * 5
        assert [rows[1][1] for rows in bench.diary.rows] == [1] * 5
        bench.driver.submit([b"a", b"b", b"c"], [1])
        bench.popped()
        expected = [[bench.driver.read_slot(slot % SIZE) for slot in range(10, 14)]]
        assert bench.diary.rows[-1:] == expected
    else:
        assert [list(rows) for rows in bench.diary.rows] == expected


def test_an_unpopped_chain_is_forgotten(bench: Bench) -> None:
    bench.offer(2)
    one, two = bench.popped(), bench.popped()
    with pytest.raises(ValueError, match="not the one popped last"):
        bench.queue.unpop(one)
    bench.queue.unpop(two)
    assert bench.diary.lines[-1] == ("untake", 102)
    assert bench.queue.in_hand == 1
    assert bench.popped().head == two.head
    assert bench.diary.lines[-1] == ("take", two.head, 103)


def test_bugs_of_the_device_are_told_and_not_noted(bench: Bench) -> None:
    bench.offer(2)
    one, two = bench.popped(), bench.popped()
    noted = len(bench.diary.lines)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="bytes written of 1 writable"):
            bench.queue.push(one, wrong)
        with pytest.raises(ValueError, match="bytes written of 1 writable"):
            bench.queue.push_together([(two, 0), (one, wrong)])
    with pytest.raises(ValueError, match="pushed twice"):
        bench.queue.push_together([(one, 0), (one, 0)])
    other = Bench(bench.features)
    other.offer(1)
    with pytest.raises(ValueError, match="pushed twice, or elsewhere"):
        bench.queue.push(other.popped())
    assert len(bench.diary.lines) == noted
    assert bench.queue.in_hand == 2
    bench.queue.push(one)
    with pytest.raises(ValueError, match="pushed twice"):
        bench.queue.push(one)
    assert bench.queue.in_hand == 1
    assert len(bench.driver.reap()) == 1


def test_a_dead_queue_notes_nothing_more(bench: Bench) -> None:
    bench.offer(3)
    one, two, three = (bench.popped() for _ in range(3))
    noted = len(bench.diary.lines)
    bench.queue.kill()
    bench.queue.push(one)
    bench.queue.push_together([(two, 0)])
    bench.queue.unpop(three)
    bench.queue.notify()
    assert bench.queue.pop() is None
    assert len(bench.diary.lines) == noted
    assert (bench.queue.in_hand, bench.driver.used_idx, bench.interrupts) == (1, 0, 0)
    assert list(bench.queue._entries) == [three]  # type: ignore[attr-defined]


@pytest.mark.parametrize("together", [False, True])
def test_what_the_end_of_the_queue_overtakes_stays_in_flight(bench: Bench, together: bool) -> None:
    bench.offer(2)
    chains = [bench.popped(), bench.popped()]
    bench.diary.on_giving = bench.queue.kill
    if together:
        bench.queue.push_together([(chain, 0) for chain in chains])
    else:
        bench.queue.push(chains[0])
    assert bench.diary.lines[-1][0] == "giving"
    assert bench.driver.used_idx == 0


def test_what_an_earlier_device_left_comes_first_and_in_its_order(bench: Bench) -> None:
    left = bench.crash(3)
    fresh = bench.offer(1)
    assert bench.queue.pending == 4
    assert bench.queue.in_hand == 0
    chains = [bench.popped() for _ in range(4)]
    assert bench.queue.in_hand == 4
    assert [chain.head for chain in chains] == [request.head for request in left + fresh]
    assert [chain.read() for chain in chains] == [b"\0", b"\1", b"\2", b"\0"]
    # Only what is new is noted: the rest is, under the entries it was left with.
    assert [line for line in bench.diary.lines if line[0] == "take"] == [("take", fresh[0].head, 101)]
    for chain in (chains[1], chains[3], chains[0], chains[2]):
        bench.queue.push(chain)
    entries = [40, 41, 42] if bench.packed else [request.head for request in left]
    given = [line[1] for line in bench.diary.lines if line[0] == "given"]
    assert given == [entries[1], 101, entries[0], entries[2]]
    assert bench.driver.reap() == [left[1], fresh[0], left[0], left[2]]
    assert bench.queue.in_hand == 0
    assert bench.queue.counters()["popped"] == bench.queue.counters()["pushed"] == 4
    assert bench.queue.pop() is None
    assert not bench.errors


def test_what_was_left_can_be_unpopped(bench: Bench) -> None:
    bench.crash(3)
    one, two = bench.popped(), bench.popped()
    with pytest.raises(ValueError, match="not the one popped last"):
        bench.queue.unpop(one)
    bench.queue.unpop(two)
    assert (bench.queue.in_hand, bench.queue.pending) == (1, 2)
    assert bench.popped().read() == b"\1"
    assert not [line for line in bench.diary.lines if line[0] in ("take", "untake")]


def test_a_full_ring_that_was_left_is_served_within_the_budget(bench: Bench) -> None:
    count = SIZE // 2  # of two descriptors each
    bench.crash(count)
    bench.queue.limit(2)
    first = list(bench.queue)
    assert len(first) == 2
    bench.queue.notify()
    assert bench.returns == 1
    assert len(list(bench.queue)) == count - 2
    assert bench.queue.pop() is None


def test_the_first_notify_interrupts_whatever_was_asked(bench: Bench) -> None:
    """The device before may have been killed between giving back and interrupting."""
    bench.driver.set_no_interrupt(True)
    bench.queue.notify()
    bench.queue.notify()
    assert bench.interrupts == 1
    assert bench.queue.counters()["interrupts"] == 1


def test_a_closed_queue_gives_nothing_of_what_was_left(bench: Bench) -> None:
    left = bench.crash(3)
    one = bench.popped()
    bench.queue.close()
    assert bench.queue.pop() is None
    assert bench.queue.pending == 0
    bench.queue.push(one)
    assert bench.queue.in_hand == 0
    assert bench.driver.reap() == left[:1]
    assert not bench.queue.dead


def test_reached_waits_for_what_was_left(bench: Bench) -> None:
    bench.crash(1)
    position = bench.driver.position
    assert not bench.queue.reached(position)
    bench.popped()
    assert bench.queue.reached(position)


@pytest.mark.parametrize(
    ("position", "slots"),
    # Wrap counters 1, 0 and from 1 to 0; a full ring, and none.
    [
        (0x8002_8005, {2: 1, 3: 1, 4: 1}),
        (0x0002_0005, {2: 0, 3: 0, 4: 0}),
        (0x8006_0002, {6: 1, 7: 1, 0: 0, 1: 0}),
        (0x8000_0000, dict.fromkeys(range(8), 1)),
        (0x8003_8003, {}),
    ],
)
def test_what_a_batch_left_in_a_packed_ring_is_available_again(position: int, slots: dict[int, int]) -> None:
    """Whoever gave the batch back was killed before the first of it, which is what the driver looks at."""
    bench = Bench(PACKED)
    assert isinstance(bench.driver, PackedDriver)
    avail, used = spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED
    for untouched in (0, avail, used, avail | used):
        for slot in range(SIZE):
            bench.driver.write_slot(slot, slot, 4, slot, 1 | untouched)
        bench.device(position)
        for slot in range(SIZE):
            flags = untouched
            if slot in slots and flags == (avail | used if slots[slot] else 0):
                flags = avail if slots[slot] else used
            assert bench.driver.read_slot(slot) == (slot, 4, slot, 1 | flags)


def test_descriptors_that_were_left_are_checked() -> None:
    bench = Bench(PACKED)
    bench.offer(1)
    bench.popped()
    bench.device(bench.queue.position, [Taken(0, [(1 << 60, 4, 0, 0), (0x8000_0000, 4, 0, 0)])])
    with pytest.raises(BadDescriptorChain, match="is not guest memory"):
        bench.queue.pop()
    assert bench.queue.pop() is None
    assert len(bench.errors) == 1


@pytest.mark.parametrize("features", [IN_ORDER, IN_ORDER | PACKED])
def test_in_order_is_kept_around_a_tracked_queue(features: int) -> None:
    bench = Bench(features)
    assert isinstance(bench.queue, InOrderQueue)
    assert isinstance(bench.queue._ring, TrackedQueue)
    requests = bench.offer(3)
    chains = [bench.popped() for _ in range(3)]
    for chain in reversed(chains):
        bench.queue.push(chain)
    assert bench.driver.reap() == requests
    assert [line[1] for line in bench.diary.lines if line[0] == "given"] == [101, 102, 103]
    assert bench.queue.in_hand == 0
