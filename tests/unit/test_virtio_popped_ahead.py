"""Chains that a device popped ahead, for what may come, go back into their place when it has to stop."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from qvmcore.testing.samples import Echo
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.inflight import Taken
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.spec import DEVICE_NEEDS_RESET
from tests.unit.test_virtio_rebind import KIND_NAMES, KINDS, PACKED, Bench, NoAccount
from tests.unit.test_virtio_remote import PACKED as REMOTE_PACKED
from tests.unit.test_virtio_remote import VERSION_1, Remote, until


class Hoarder(Echo):
    """Keeps what it is offered until it is told to answer."""

    source: Virtqueue

    def on_activate(self, features: int) -> None:
        self.stock: list[Chain] = []

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        self.stock += list(queue)
        self.source = queue

    def on_queue_stop(self, index: int, queue: Virtqueue) -> None:
        queue.unpop_all(self.stock)
        self.stock.clear()

    def answer(self, count: int) -> None:
        """The first ones, on the worker."""
        for chain in self.stock[:count]:
            chain.write(chain.read())
            self.source.push(chain)
        del self.stock[:count]
        self.source.notify()


class Hoard(Remote):
    """A Hoarder and its client."""

    kind = Hoarder
    vdev: Hoarder

    def roundtrips(self, count: int) -> None:
        """Answer ``count`` of what was offered."""
        self.ctx.worker.call(lambda: self.vdev.answer(count))


@pytest.fixture(params=[VERSION_1, VERSION_1 | REMOTE_PACKED], ids=["split", "packed"])
def hoard(request: pytest.FixtureRequest) -> Iterator[Hoard]:
    each = Hoard(request.param)
    each.state.negotiate(each.features)
    each.start()
    yield each
    each.close()


def test_a_stopped_queue_is_offered_them_again(hoard: Hoard, caplog: pytest.LogCaptureFixture) -> None:
    """Rings of 16 slots wrap meanwhile."""
    requests = [hoard.ring.submit([b"%d" % number], [8]) for number in range(5)]
    done = 0
    for _ in range(12):
        until(lambda: len(hoard.vdev.stock) == 5)
        hoard.roundtrips(2)
        until(lambda: len(hoard.vdev.stock) == 3)
        with caplog.at_level(logging.WARNING):
            position = hoard.state.stop_queue(0, 1)
        assert not caplog.records and not hoard.vdev.stock
        hoard.start(position)
        assert hoard.ring.reap() == requests[done : done + 2]
        done += 2
        requests += [hoard.ring.submit([b"%d" % (len(requests) + each)], [8]) for each in range(2)]
    hoard.roundtrips(5)
    assert [request.result()[:2].rstrip(b"\0") for request in requests[:done]] == [
        b"%d" % number for number in range(done)
    ]


def test_memory_that_moves_needs_no_reset(hoard: Hoard) -> None:
    requests = [hoard.ring.submit([b"%d" % number], [8]) for number in range(3)]
    until(lambda: len(hoard.vdev.stock) == 3)
    old = hoard.memory.regions
    hoard.state.remap(lambda: hoard.memory.replace([hoard.region()]))
    assert not hoard.state.status & DEVICE_NEEDS_RESET
    until(lambda: len(hoard.vdev.stock) == 3)
    assert all(region.close() for region in old)
    hoard.roundtrips(3)
    until(lambda: hoard.ring.reap() == requests)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("features", KINDS, ids=KIND_NAMES)
def test_they_are_popped_again_in_their_order(features: int, tracked: bool) -> None:
    bench = Bench(features, NoAccount() if tracked else None)
    for _ in range(9):
        requests = [bench.driver.submit([bytes([number])], [4]) for number in range(3)]
        first, second, third = (bench.popped() for _ in range(3))
        bench.queue.unpop_all([])
        bench.queue.unpop_all([second, third])
        assert bench.queue.in_hand == 1
        again = [bench.popped(), bench.popped()]
        assert [chain.read() for chain in again] == [b"\1", b"\2"] and bench.queue.pop() is None
        for chain in (first, *again):
            bench.queue.push(chain)
        bench.queue.notify()
        assert bench.driver.reap() == requests


@pytest.mark.parametrize("features", KINDS, ids=KIND_NAMES)
def test_only_those_popped_last_can_be_given_back(features: int) -> None:
    bench = Bench(features)
    for number in range(3):
        bench.driver.submit([bytes([number])], [4])
    first, second, third = (bench.popped() for _ in range(3))
    for wrong in ([first], [second, first], [first, second]):
        with pytest.raises(ValueError, match="not among those popped last"):
            bench.queue.unpop_all(wrong)
    bench.queue.unpop_all([second, third])
    with pytest.raises(ValueError, match="not among those popped last"):
        bench.queue.unpop_all([first])
    assert bench.queue.in_hand == 1
    bench.queue.kill()
    bench.queue.unpop_all([first])


@pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])
def test_with_what_an_earlier_device_left(features: int) -> None:
    bench = Bench(features)
    requests = [bench.driver.submit([bytes([number])], [4]) for number in range(3)]
    left = []
    for number in range(2):
        slots = range(2 * number, 2 * number + 2) if features else ()
        rows = [bench.driver.read_slot(slot) for slot in slots]  # type: ignore[attr-defined]
        left.append(Taken(bench.popped().head, rows))
    bench.make(NoAccount(bench.queue.position, tuple(left)))
    for _ in range(2):
        chains = [bench.popped() for _ in range(3)]
        assert [chain.read() for chain in chains] == [b"\0", b"\1", b"\2"]
        bench.queue.unpop_all(chains)
    chains = [bench.popped() for _ in range(3)]
    bench.queue.push(chains[0])
    bench.queue.unpop_all(chains[1:])
    for _ in range(2):
        bench.queue.push(bench.popped())
    assert bench.driver.reap() == requests
