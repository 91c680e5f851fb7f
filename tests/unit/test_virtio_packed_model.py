"""The packed ring against a reference model, in random order of driver and device actions (2.8)."""

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
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, Request
from qvmcore.testing.strategies import good_chains
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.packed import PackedQueue, PackedRings

BOTH = spec.VIRTQ_DESC_F_AVAIL | spec.VIRTQ_DESC_F_USED


class PackedModel(RuleBasedStateMachine):
    """The model: a FIFO of offered requests, the descriptors each has, and suppression by the letter.

    ``avail`` and ``used`` count descriptors without wrapping; the wrap counter is the parity of the round.
    """

    held = Bundle("held")

    @initialize(
        size=st.sampled_from((1, 2, 3, 7, 8, 32)),
        event_idx=st.booleans(),
        indirect=st.booleans(),
    )
    def begin(self, size: int, event_idx: bool, indirect: bool) -> None:
        self.memory = GuestMemory.allocate([MemorySpec(0x4000_0000, 1 << 20)])
        features = int(event_idx) << spec.VIRTIO_F_EVENT_IDX | 1 << spec.VIRTIO_F_INDIRECT_DESC
        self.driver = PackedDriver(GuestRam(self.memory), size, features, self.kick)
        self.driver.indirect = indirect
        rings = PackedRings(self.memory, size, self.driver.desc, self.driver.avail, self.driver.used)
        calls = (self.interrupt, lambda error: None, self.come_back)
        self.queue = PackedQueue(0, rings, self.memory, features, *calls)
        self.interrupts = self.expected = self.returns = 0
        self.budget = size
        self.waiting: deque[tuple[Request, bytes]] = deque()
        self.unpublished: deque[tuple[Request, bytes]] = deque()
        self.given_back: dict[int, tuple[Request, int, bytes]] = {}
        self.avail = self.used = self.told = 0
        self.event: tuple[int, int] = (0, 0)
        self.asleep = True

    def interrupt(self) -> None:
        self.interrupts += 1

    def kick(self) -> None:
        pass

    def come_back(self) -> None:
        self.returns += 1

    def name(self, position: int) -> int:
        """What 2.8.10 calls a descriptor: its offset, and the wrap counter in bit 15."""
        lap, offset = divmod(position, self.driver.size)
        return offset | (0 if lap % 2 else 0x8000)

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
            flags = spec.RING_EVENT_FLAGS_DESC if self.driver.event_idx else spec.RING_EVENT_FLAGS_ENABLE
            place = self.name(self.avail) if self.driver.event_idx else 0
            assert self.driver.device_event == (place, flags)
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
        self.avail += len(request.descriptors)
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
        slot, lap = self.used % self.driver.size, self.used // self.driver.size
        _, length, ident, flags = self.driver.read_slot(slot)
        assert (ident, flags & BOTH) == (request.head, 0 if lap % 2 else BOTH)
        assert (length, bool(flags & spec.VIRTQ_DESC_F_WRITE)) == (written, written > 0)
        self.used += len(request.descriptors)
        self.given_back[request.head] = (request, written, data[:written])
        if self.queue._signalled == self.queue._pushed:
            self.tell()  # before notify(): a part of a batch, or all there was

    @rule()
    def notify(self) -> None:
        self.queue.notify()
        self.notified()

    def notified(self) -> None:
        self.budget = self.driver.size
        self.tell()

    def tell(self) -> None:
        place, flags = self.event
        if self.told < self.used:
            if flags == spec.RING_EVENT_FLAGS_DESC and self.driver.event_idx:
                new = range(self.told, self.used)
                self.expected += any(self.name(position) == place for position in new)
            else:
                self.expected += flags != spec.RING_EVENT_FLAGS_DISABLE
        self.told = self.used
        assert self.interrupts == self.expected

    @rule(flags=st.integers(0, 3))
    def set_flags(self, flags: int) -> None:
        self.event = (self.event[0], flags)
        self.driver.write_event(*self.event)

    @rule(ahead=st.integers(-2, 40))
    def set_event(self, ahead: int) -> None:
        self.event = (self.name(max(0, self.driver.returned + ahead)), spec.RING_EVENT_FLAGS_DESC)
        self.driver.write_event(*self.event)

    @rule()
    def reap(self) -> None:
        for request in self.driver.reap():
            expected, written, data = self.given_back.pop(request.head)
            assert request is expected
            assert request.length == written
            assert request.result()[:written] == data
        if self.driver.event_idx:
            self.event = (self.name(self.driver.returned), spec.RING_EVENT_FLAGS_DESC)
        assert not self.given_back
        assert self.driver.returned == self.used

    @invariant()
    def both_sides_agree(self) -> None:
        if hasattr(self, "driver"):
            assert self.queue.pending == len(self.waiting)
            assert self.queue.reached(self.name(self.avail))
            assert self.used <= self.avail <= self.driver.filled <= self.driver.returned + self.driver.size


PackedModel.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestPackedModel = PackedModel.TestCase
