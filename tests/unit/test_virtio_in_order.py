"""VIRTIO_F_IN_ORDER: whatever the order of push, the driver gets its buffers in order (2.7.9, 2.8.8, 6.2)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from qvmcore.memory import GuestMemory
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import plug
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, RingDriver, SplitDriver
from qvmcore.testing.samples import Echo
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.in_order import InOrderQueue
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup

IN_ORDER = 1 << spec.VIRTIO_F_IN_ORDER
PACKED = 1 << spec.VIRTIO_F_RING_PACKED


class Bench:
    """A driver and an in-order queue, split or packed, made as the state machine makes it."""

    def __init__(self, packed: bool, size: int = 8) -> None:
        self.memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 20)])
        features = IN_ORDER | (PACKED if packed else 0)
        kind = PackedDriver if packed else SplitDriver
        self.driver: RingDriver = kind(GuestRam(self.memory), size, features)
        self.interrupts = 0
        setup = QueueSetup(size)
        setup.desc, setup.driver, setup.device = self.driver.desc, self.driver.avail, self.driver.used
        setup.enable(self.memory, features)
        self.queue: Virtqueue = setup.make(
            0, self.memory, features, self.interrupt, lambda error: None, lambda: None
        )

    def interrupt(self) -> None:
        self.interrupts += 1

    def popped(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_6_2_any_order_of_push_gives_the_order_of_offering(bench: Bench, order: tuple[int, ...]) -> None:
    assert isinstance(bench.queue, InOrderQueue)
    for _ in range(3):
        requests = [bench.driver.submit([bytes([number])], [4]) for number in range(4)]
        chains = [bench.popped() for _ in range(4)]
        back = []
        for number in order:
            bench.queue.push(chains[number], number)
            back += bench.driver.reap()
            assert back == requests[: len(back)]
            done = set(order[: order.index(number) + 1])
            assert len(back) == next(n for n in range(5) if n not in done)
        assert [request.length for request in back] == [0, 1, 2, 3]
        bench.queue.notify()


def test_6_2_what_waits_sends_no_interrupt(bench: Bench) -> None:
    for _ in range(2):
        bench.driver.submit([b"x"])
    one, two = bench.popped(), bench.popped()
    bench.queue.push(two)
    bench.queue.notify()
    assert (bench.interrupts, bench.queue.counters()["pushed"]) == (0, 0)
    bench.queue.push(one)
    bench.queue.notify()
    assert (bench.interrupts, bench.queue.counters()["pushed"]) == (1, 2)


def test_the_bytes_written_are_those_at_the_push(bench: Bench) -> None:
    first, second = bench.driver.submit([b"x"], [4]), bench.driver.submit([b"x"], [4])
    one, two = bench.popped(), bench.popped()
    two.write(b"abc")
    bench.queue.push(two)
    one.write(b"a")
    bench.queue.push(one)
    assert bench.driver.reap() == [first, second]
    assert (first.length, second.length) == (1, 3)


def test_bugs_of_the_device_are_told_at_once(bench: Bench) -> None:
    other = Bench(False)
    for each in (bench, other):
        for _ in range(3):
            each.driver.submit([b"x"], [4])
    one, two, three = (bench.popped() for _ in range(3))
    foreign = other.popped()
    with pytest.raises(ValueError, match="bytes written of 4 writable"):
        bench.queue.push(two, 5)
    bench.queue.push(two, 4)
    with pytest.raises(ValueError, match="pushed twice"):
        bench.queue.push(two, 4)
    with pytest.raises(ValueError, match="pushed twice, or elsewhere"):
        bench.queue.push(foreign)
    with pytest.raises(ValueError, match="not the one popped last"):
        bench.queue.unpop(one)
    bench.queue.push(one)
    with pytest.raises(ValueError, match="pushed twice"):
        bench.queue.push(one)
    bench.queue.push(three)
    assert len(bench.driver.reap()) == 3


def test_unpop_forgets_the_chain(bench: Bench) -> None:
    for _ in range(2):
        bench.driver.submit([b"x"])
    one, two = bench.popped(), bench.popped()
    bench.queue.unpop(two)
    bench.queue.push(one)
    assert len(bench.driver.reap()) == 1
    two = bench.popped()
    bench.queue.push(two)
    assert len(bench.driver.reap()) == 1


def test_a_chain_that_waits_cannot_be_unpopped(bench: Bench) -> None:
    for _ in range(2):
        bench.driver.submit([b"x"])
    bench.popped()
    two = bench.popped()
    bench.queue.push(two)
    with pytest.raises(ValueError, match="was pushed already"):
        bench.queue.unpop(two)


def test_a_dead_queue_is_silent(bench: Bench) -> None:
    for _ in range(3):
        bench.driver.submit([b"x"])
    one, two, three = (bench.popped() for _ in range(3))
    bench.queue.push(two)
    bench.queue.kill()
    bench.queue.push(three)
    bench.queue.push(one)
    bench.queue.unpop(three)
    bench.queue.notify()
    assert bench.queue.dead
    assert bench.queue.pop() is None
    assert bench.queue.pending == 0
    assert (bench.driver.used_idx, bench.interrupts) == (0, 0)


class Backwards(Echo):
    """Gives its chains back in the wrong order."""

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        for chain in reversed(list(queue)):
            self._echo(chain)
            queue.push(chain)


class Stubborn(Backwards):
    in_order = False


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "in_order"), [(Backwards, True), (Stubborn, False)])
def test_6_2_the_author_decides_whether_it_is_offered(kind: Any, in_order: bool, packed: bool) -> None:
    with plug(kind) as device:
        driver = MmioDriver.of(device)
        driver.packed = packed
        driver.start()
        assert driver.features >> spec.VIRTIO_F_IN_ORDER & 1 == in_order
        device.settle()
        ring = driver.queues[0]
        requests = [ring.add([bytes([number])], [1]) for number in range(5)]
        ring.kick()
        device.settle()
        assert ring.reap() == (requests if in_order else requests[::-1])
