"""Queues that begin and end at a position, as vhost-user's SET/GET_VRING_BASE have it; closed queues."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import GuestMemory
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, RingDriver, SplitDriver
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.position import packed_given, packed_start, split_start
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup

IN_ORDER, PACKED = 1 << spec.VIRTIO_F_IN_ORDER, 1 << spec.VIRTIO_F_RING_PACKED
EVENT_IDX = 1 << spec.VIRTIO_F_EVENT_IDX
SIZE = 8


class Bench:
    """A driver whose device comes and goes."""

    def __init__(self, features: int = 0, size: int = SIZE) -> None:
        self.memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 21)])
        self.features = features
        self.size = size
        self.driver: RingDriver = (PackedDriver if features & PACKED else SplitDriver)(
            GuestRam(self.memory), size, features
        )
        self.interrupts = 0
        self.errors: list[BaseException] = []
        self.queue = self.device()

    def interrupt(self) -> None:
        self.interrupts += 1

    def device(self, position: int | None = None) -> Virtqueue:
        setup = QueueSetup(self.size)
        setup.desc, setup.driver, setup.device = self.driver.desc, self.driver.avail, self.driver.used
        setup.enable(self.memory, self.features)
        self.queue = setup.make(
            0,
            self.memory,
            self.features,
            self.interrupt,
            self.errors.append,
            lambda: None,
            position=position,
        )
        return self.queue

    def popped(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def rounds(self, count: int) -> None:
        for number in range(count):
            request = self.driver.submit([bytes([number & 255])], [1])
            chain = self.popped()
            chain.write(chain.read())
            self.queue.push(chain)
            assert self.driver.reap() == [request]
            assert request.result() == bytes([number & 255])
            self.queue.notify()


@pytest.fixture(params=[0, EVENT_IDX, PACKED, PACKED | EVENT_IDX, IN_ORDER, PACKED | IN_ORDER])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def fresh(bench: Bench) -> int:
    return 0x8000_8000 if bench.features & PACKED else 0


def test_a_fresh_queue_has_the_position_clients_begin_with(bench: Bench) -> None:
    assert bench.queue.position == fresh(bench)
    assert bench.device(bench.queue.position).position == fresh(bench)


def test_a_device_goes_on_where_the_one_before_it_stopped(bench: Bench) -> None:
    # Long enough for the packed ring's both wrap counters, and for chains across its end.
    for length in (1, 3, 5, 8, 7, 4):
        bench.rounds(length)
        position = bench.queue.position
        bench.queue.kill()
        assert bench.device(position).position == position
        assert bench.queue.counters() == {"popped": 0, "pushed": 0, "interrupts": 0}
    assert not bench.errors


def test_the_split_position_is_the_16_bit_available_index() -> None:
    bench = Bench()
    bench.driver.avail_idx = bench.driver.published = bench.driver.last_used = 0xFFFE  # type: ignore[attr-defined]
    bench.driver.write16(bench.driver.used + 2, 0xFFFE)
    bench.device(0xFFFE)
    bench.rounds(1)
    assert bench.queue.position == 0xFFFF
    bench.rounds(2)
    assert bench.queue.position == 1
    assert bench.driver.used_idx == 1


def test_the_packed_position_has_both_places_and_wrap_counters() -> None:
    bench = Bench(PACKED, size=5)
    expected = []
    for number in range(6):
        bench.rounds(1)  # two descriptors each
        slot, wrap = 2 * (number + 1) % 5, 2 * (number + 1) // 5 % 2 == 0
        expected.append((slot | wrap << 15) * 0x10001)
        assert bench.queue.position == expected[-1]
    assert expected[1:3] == [0x8004_8004, 0x0001_0001]
    for _ in range(2):
        bench.driver.submit([b"x"])
        chain = bench.popped()
    assert bench.queue.position == expected[-1] + 2
    bench.queue.push(chain)
    assert bench.queue.position == expected[-1] + 0x1_0002


@pytest.mark.parametrize("features", [0, PACKED])
def test_chains_an_earlier_device_had_in_hand_keep_their_places(features: int) -> None:
    bench = Bench(features)
    bench.rounds(6)
    lost = [bench.driver.submit([b"lost"]) for _ in range(3)]
    for _ in lost:
        bench.popped()
    bench.device(bench.queue.position)
    assert bench.queue.in_hand == 0
    assert bench.queue.pop() is None
    more = [bench.driver.submit([b"more"]) for _ in range(5)]
    chains = [bench.popped() for _ in more]
    assert bench.queue.in_hand == 5
    assert [chain.read() for chain in chains] == [b"more"] * 5
    with pytest.raises(BadDescriptorChain):
        # The ring is full with what is lost: one more is one too many.
        bench.driver.write_desc(0, 0x8000_0000, 1)
        bench.driver.offer(0)
        bench.driver.publish()
        bench.queue.pop()


@pytest.mark.parametrize("used", [0, 5, 0xFFF0])
@pytest.mark.parametrize("ahead", [0, 1, SIZE])
def test_split_start_counts_from_the_used_index_in_memory(used: int, ahead: int) -> None:
    assert split_start((used + ahead) & 0xFFFF, used, SIZE) == (used + ahead, used)


@pytest.mark.parametrize(
    ("position", "used"), [(9, 0), (0, 1), (0xFFFF, 0), (0, 0x8000), (0x1_0000, 0), (-1, 0)]
)
def test_a_split_position_that_cannot_be_is_refused(position: int, used: int) -> None:
    bench = Bench()
    bench.driver.write16(bench.driver.used + 2, used)
    with pytest.raises(BadDescriptorChain, match="does not fit a used index"):
        bench.device(position)


@pytest.mark.parametrize(
    "position",
    [0x8000_8008, 0x8008_8000, 0x7FFF_8000, 0x8000_0008, 0x8003_8002, 0x8003_0004, 0x1_8000_8000, -1],
)
def test_a_packed_position_that_cannot_be_is_refused(position: int) -> None:
    with pytest.raises(BadDescriptorChain):
        Bench(PACKED).device(position)


@given(position=st.integers(0, 0xFFFF_FFFF), size=st.integers(1, 1024))
def test_any_packed_position_is_refused_or_kept_exactly(position: int, size: int) -> None:
    try:
        avail, used = packed_start(position, size)
    except BadDescriptorChain:
        return
    assert 0 <= avail - used <= size
    halves = [place % size | (0x8000 if place // size % 2 == 0 else 0) for place in (avail, used)]
    assert halves[0] | halves[1] << 16 == position


def test_a_full_packed_ring_in_flight_is_a_position() -> None:
    assert packed_start(0x8003_0003, 8) == (11, 3)
    assert packed_start(0x0003_8003, 8) == (19, 11)


@pytest.mark.parametrize("position", [0, 0x8000])
def test_clients_that_begin_a_packed_ring_with_16_bits_mean_a_fresh_one(position: int) -> None:
    bench = Bench(PACKED)
    requests = [bench.driver.submit([b"x"]) for _ in range(8)]
    bench.device(position)
    for _ in requests:
        bench.queue.push(bench.popped())
    assert bench.driver.reap() == requests


@pytest.mark.parametrize("offer", [0, 3, 8])
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_position_0_of_a_packed_ring_after_one_lap_is_not_a_fresh_one(offer: int, pieces: int) -> None:
    bench = Bench(PACKED)
    for _ in range(8 // pieces):
        bench.driver.submit([b"x"] * pieces)
        bench.queue.push(bench.popped())
        bench.driver.reap()
    assert bench.queue.position == 0
    requests = [bench.driver.submit([b"y"]) for _ in range(offer)]
    bench.device(0)
    assert bench.queue.position == 0
    for _ in requests:
        bench.queue.push(bench.popped())
    assert bench.driver.reap() == requests


def test_a_client_that_knows_the_available_half_means_that_all_came_back() -> None:
    assert packed_given(0x8005, []) == 0x8005_8005
    assert packed_given(0x0005, []) == 0x0005_0005
    assert packed_given(0x8003_8005, []) == 0x8003_8005


def test_no_position_ignores_what_lies_in_the_used_ring() -> None:
    """A guest of our own begins with index 0, whatever its memory held."""
    bench = Bench()
    bench.driver.write16(bench.driver.used + 2, 1234)
    bench.device()
    bench.driver.submit([b"x"])
    bench.queue.push(bench.popped())
    assert bench.driver.used_idx == 1


def test_in_hand_counts_what_was_popped_and_not_pushed(bench: Bench) -> None:
    bench.rounds(3)
    for _ in range(4):
        bench.driver.submit([b"x"])
    chains = [bench.popped() for _ in range(4)]
    assert bench.queue.in_hand == 4
    bench.queue.unpop(chains.pop())
    assert bench.queue.in_hand == 3
    bench.queue.push(chains[0])
    assert bench.queue.in_hand == 2
    bench.queue.push_together([(chain, 0) for chain in chains[1:]])
    assert bench.queue.in_hand == 0


def test_in_hand_falls_on_a_dead_queue_too(bench: Bench) -> None:
    for _ in range(4):
        bench.driver.submit([b"x"])
    one, two, three, four = (bench.popped() for _ in range(4))
    bench.queue.kill()
    assert bench.queue.in_hand == 4
    bench.queue.push(two)
    assert bench.queue.in_hand == 3
    bench.queue.push_together([(one, 0), (three, 0)])
    assert bench.queue.in_hand == 1
    dead, next_life = bench.queue, bench.device(bench.queue.position)
    next_life.push(four)
    assert bench.driver.used_idx == 0
    assert (dead.in_hand, next_life.in_hand) == (0, 0)


def test_a_chain_of_a_dead_queue_counts_once() -> None:
    bench = Bench()
    for _ in range(2):
        bench.driver.submit([b"x"])
    one = bench.popped()
    bench.popped()
    dead = bench.queue
    dead.kill()
    dead.push(one)
    dead.push(one)
    bench.device(dead.position).push(one)
    assert dead.in_hand == 1


def test_a_closed_queue_gives_nothing_and_takes_everything_back(bench: Bench) -> None:
    requests = [bench.driver.submit([b"x"]) for _ in range(3)]
    one, two, three = (bench.popped() for _ in range(3))
    bench.queue.unpop(three)
    position = bench.queue.position
    bench.queue.close()
    assert bench.queue.pop() is None
    assert bench.queue.pending == 0
    assert not bench.queue.dead
    bench.queue.push(two)
    bench.queue.push(one)
    bench.queue.notify()
    assert bench.interrupts == 1
    assert len(bench.driver.reap()) == 2
    assert bench.queue.in_hand == 0
    if not bench.features & PACKED:
        assert bench.queue.position == position
    # What was not taken is the next device's.
    bench.device(bench.queue.position)
    bench.queue.push(bench.popped())
    assert bench.driver.reap() == [requests[2]]


def test_a_batch_on_a_dead_queue_is_dropped_whole(bench: Bench) -> None:
    for _ in range(2):
        bench.driver.submit([b"x"])
    chains = [bench.popped() for _ in range(2)]
    before = bench.memory.read(bench.driver.used, 4), bench.memory.read(bench.driver.desc, 16 * SIZE)
    bench.queue.kill()
    bench.queue.push_together([(chain, 0) for chain in chains])
    assert (
        bench.memory.read(bench.driver.used, 4),
        bench.memory.read(bench.driver.desc, 16 * SIZE),
    ) == before
