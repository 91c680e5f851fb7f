"""The split ring against a reference model, in random order of driver and device actions (2.7)."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from qvmcore.memory import GuestMemory
from qvmcore.testing.ring import GuestRam, Request, SplitDriver
from qvmcore.testing.strategies import good_chains
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.split import SplitQueue, SplitRings


class RingModel(RuleBasedStateMachine):
    """The model: a FIFO of offered requests, and the rules of suppression written as in 2.7.7 and 2.7.10."""

    held = Bundle("held")

    @initialize(
        size=st.sampled_from((1, 2, 8, 32)),
        event_idx=st.booleans(),
        indirect=st.booleans(),
        start=st.integers(0, 3),
    )
    def begin(self, size: int, event_idx: bool, indirect: bool, start: int) -> None:
        self.memory = GuestMemory.allocate([MemorySpec(0x4000_0000, 1 << 20)])
        features = int(event_idx) << spec.VIRTIO_F_EVENT_IDX | 1 << spec.VIRTIO_F_INDIRECT_DESC
        self.driver = SplitDriver(GuestRam(self.memory), size, features, self.kick)
        self.driver.indirect = indirect
        rings = SplitRings(self.memory, size, self.driver.desc, self.driver.avail, self.driver.used)
        calls = (self.interrupt, lambda error: None, self.come_back)
        self.queue = SplitQueue(0, rings, self.memory, features, *calls)
        self.interrupts = self.expected = self.kicks = self.returns = 0
        self.budget = size
        self.waiting: deque[tuple[Request, bytes]] = deque()
        self.unpublished: deque[tuple[Request, bytes]] = deque()
        self.given_back: dict[int, tuple[Request, int, bytes]] = {}
        self.silent = 0
        self.no_interrupt = False
        self.used_event = 0
        self.pushed = 0
        self.asleep = True
        if start:
            # Start near the wrap, so that a short run crosses it.
            self.fast_forward(65536 - start)

    def fast_forward(self, count: int) -> None:
        self.queue._start(count, count)
        self.queue._offered = count
        self.driver.avail_idx = self.driver.published = self.driver.last_used = count
        self.driver.publish()
        self.driver.write16(self.driver.used + 2, count)
        if self.driver.event_idx:
            self.driver.write16(self.driver.used + 4 + 8 * self.driver.size, count)
        self.pushed = count

    def interrupt(self) -> None:
        self.interrupts += 1

    def kick(self) -> None:
        self.kicks += 1

    def come_back(self) -> None:
        self.returns += 1

    @rule(chain=good_chains())
    def add(self, chain: tuple[list[bytes], list[int]]) -> None:
        readable, writable = chain
        if self.driver.indirect and len(readable) + len(writable) > self.driver.size:
            return
        try:
            request = self.driver.add(readable, writable)
        except MemoryError:
            return
        self.unpublished.append((request, b"".join(readable)))

    @precondition(lambda self: self.unpublished)
    @rule()
    def publish(self) -> None:
        told = self.driver.kick()
        # A device that sleeps must be told; one that was told already, or is awake, may be.
        assert told or not self.asleep, "a sleeping device was not notified"
        self.asleep = False
        self.waiting += self.unpublished
        self.unpublished.clear()

    @rule(target=held)
    def pop(self) -> tuple[Chain, Request] | None:
        chain = self.queue.pop()
        if not self.waiting:
            assert chain is None
            self.asleep = True
            return None
        self.asleep = False
        if not self.budget:
            assert chain is None
            self.queue.notify()
            assert self.returns == 1
            self.returns = 0
            self.notified()
            return None
        self.budget -= 1
        request, data = self.waiting.popleft()
        assert chain is not None
        assert chain.head == request.head
        assert b"".join(chain.unread()) == data
        assert chain.writable == sum(piece.length for piece in request.writable)
        return chain, request

    @rule()
    def unpop(self) -> None:
        if self.waiting and self.budget:
            chain = self.queue.pop()
            assert chain is not None
            self.queue.unpop(chain)
            self.asleep = False

    @rule(item=consumes(held), data=st.binary(max_size=60))
    def push(self, item: tuple[Chain, Request] | None, data: bytes) -> None:
        if item is None:
            return
        chain, request = item
        written = chain.write(data)
        self.queue.push(chain)
        self.given_back[request.head] = (request, written, data[:written])
        self.pushed += 1
        self.silent += 1
        if self.queue._signalled == self.queue._pushed:
            self.told()  # before notify(): a part of a batch, or all there was

    @rule()
    def notify(self) -> None:
        self.queue.notify()
        self.notified()

    def notified(self) -> None:
        self.budget = self.driver.size
        self.told()

    def told(self) -> None:
        if self.silent:
            if self.driver.event_idx:
                new = range(self.pushed - self.silent, self.pushed)
                self.expected += any(position & 0xFFFF == self.used_event for position in new)
            else:
                self.expected += not self.no_interrupt
            self.silent = 0
        assert self.interrupts == self.expected

    @rule(off=st.booleans())
    def set_no_interrupt(self, off: bool) -> None:
        self.no_interrupt = off
        self.driver.set_no_interrupt(off)

    @rule(ahead=st.integers(-2, 5))
    def set_used_event(self, ahead: int) -> None:
        self.used_event = (self.driver.last_used + ahead) & 0xFFFF
        self.driver.set_used_event(self.used_event)

    @rule()
    def reap(self) -> None:
        for request in self.driver.reap():
            expected, written, data = self.given_back.pop(request.head)
            assert request is expected
            assert request.length == written
            assert request.result()[:written] == data
        if self.driver.event_idx:
            self.used_event = self.driver.last_used
        assert not self.given_back

    @invariant()
    def used_never_ahead_of_avail(self) -> None:
        if hasattr(self, "driver"):
            ahead = (self.driver.published - self.driver.used_idx) & 0xFFFF
            assert ahead <= self.driver.size
            assert self.driver.used_idx == self.pushed & 0xFFFF


RingModel.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestRingModel = RingModel.TestCase
