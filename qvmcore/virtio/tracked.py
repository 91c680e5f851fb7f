"""A queue that has it noted what is in hand, and begins with what an earlier device left there."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.inflight import Inflight, Taken
from qvmcore.virtio.packed import PackedQueue
from qvmcore.virtio.position import packed_start
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.ring import RingQueue
from qvmcore.virtio.rings import PackedRings, SplitRings
from qvmcore.virtio.split import SplitQueue

_NEXT, _AVAIL, _USED = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED
_DESCRIPTOR = struct.Struct("<QIHH").pack


class TrackedQueue(Virtqueue):
    """A virtqueue around a ring that has everything noted; what an earlier device left comes first.

    What was left is offered again by a ring of our own, ``replay``, so that it is checked as
    everything a driver offers; it is given back through ``ring``, which counts it as in flight.
    """

    __slots__ = (
        "_descriptors", "_entries", "_left", "_newest", "_offered", "_old", "_owing", "_replay", "_ring",
        "_tracker",
    )  # fmt: skip

    def __init__(
        self,
        ring: SplitQueue | PackedQueue,
        tracker: Inflight,
        replay: RingQueue,
        offered: SplitRings | PackedRings,
        left: Iterable[Taken],
    ) -> None:
        self.index = ring.index
        self.size = ring.size
        self._ring = ring
        self._tracker = tracker
        self._replay = replay
        self._offered = offered  # the rings of replay
        self._left = deque(taken.entry for taken in left)  # what replay gives
        self._newest: Chain | None = None  # the last one of replay, while nothing else was popped
        self._entries: dict[Chain, int] = {}  # chains in hand
        self._old: set[Chain] = set()  # those of replay
        # Those of a split ring are in its table until the chain is given back.
        self._descriptors = ring.descriptors if isinstance(ring, PackedQueue) else None
        # The device before us may have been killed between giving back and interrupting.
        self._owing = True

    def pop(self) -> Chain | None:
        """See :meth:`Virtqueue.pop`."""
        if self._left:
            chain = self._replay.pop()
            if chain is not None:
                chain._queue = self._ring
                self._entries[chain] = self._left.popleft()
                self._newest = chain
                self._old.add(chain)
            return chain
        chain = self._ring.pop()
        if chain is not None:
            self._newest = None
            look = self._descriptors
            self._entries[chain] = self._tracker.take(chain.head, look(chain._count) if look else ())
        return chain

    def unpop(self, chain: Chain) -> None:
        """See :meth:`Virtqueue.unpop`."""
        if self._ring.dead:
            return
        if chain is self._newest and chain in self._entries:
            chain._queue = self._replay
            self._replay.unpop(chain)
            self._left.appendleft(self._entries.pop(chain))
            self._old.discard(chain)
            return
        self._ring.unpop(chain)
        if not self._ring.dead:
            self._tracker.untake(self._entries.pop(chain))

    def unpop_all(self, chains: Sequence[Chain]) -> None:
        """See :meth:`Virtqueue.unpop_all`."""
        if self._ring.dead:
            return
        # What was left comes before all else.
        old = [chain for chain in chains if chain in self._old]
        new = chains[len(old) :]
        self._ring.unpop_all(new)
        for chain in reversed(new):
            self._tracker.untake(self._entries.pop(chain))
        for chain in old:
            chain._queue = self._replay
        self._replay.unpop_all(old)
        self._left.extendleft(self._entries.pop(chain) for chain in reversed(old))
        self._old.difference_update(old)

    def push(self, chain: Chain, written: int | None = None) -> None:
        """See :meth:`Virtqueue.push`."""
        if written is None:
            written = chain.written
        entry = self._entries.get(chain)
        ring = self._ring
        if entry is None or ring.dead or self._old or not 0 <= written <= chain.writable:
            if not self._refused(chain, written):
                self._give([(chain, written)])
            return
        # What _give does, for most chains.
        del self._entries[chain]
        entries = (entry,)
        self._tracker.giving(entries)
        before = ring.pushed
        ring.push(chain, written)
        if ring.pushed != before:
            self._tracker.given(entries)

    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        """See :meth:`Virtqueue.push_together`."""
        batch: dict[Chain, int] = {}
        for chain, written in used:
            if chain in batch:
                raise ValueError(f"queue {self.index}: chain {chain.head} was pushed twice")
            if not self._refused(chain, written):
                batch[chain] = written
        if batch:
            self._give(list(batch.items()))

    def notify(self) -> None:
        """See :meth:`Virtqueue.notify`."""
        self._ring.notify()
        if self._left:
            self._replay.notify()
        if self._owing:
            self._owing = False
            self._ring.interrupt()

    def limit(self, chains: int) -> None:
        """See :meth:`Virtqueue.limit`."""
        self._ring.limit(chains)
        self._replay.limit(chains)

    def kill(self) -> None:
        """See :meth:`Virtqueue.kill`."""
        self._replay.kill()
        self._ring.kill()

    def close(self) -> None:
        """See :meth:`Virtqueue.close`. What was left and is not popped yet stays noted."""
        self._replay.close()
        self._ring.close()

    def rebind(self, rings: Any, memory: GuestMemory) -> None:
        """See :meth:`Virtqueue.rebind`."""
        self._newest = None
        self._ring.rebind(rings, memory)
        if isinstance(self._offered, SplitRings):
            self._offered.table = rings.table
        self._replay.rebind(self._offered, memory)

    @property
    def position(self) -> int:
        """See :attr:`Virtqueue.position`; what was left lies before it."""
        return self._ring.position

    @property
    def in_hand(self) -> int:
        """See :attr:`Virtqueue.in_hand`."""
        # What was left is given back through the ring, but was not popped there. In this order the
        # sum is never too small.
        ring = self._ring.in_hand
        return ring + self._replay.in_hand

    @property
    def dead(self) -> bool:
        """Whether the queue has ended."""
        return self._ring.dead

    @property
    def pending(self) -> int:
        """See :attr:`Virtqueue.pending`; with what was left."""
        return self._ring.pending + self._replay.pending

    def reached(self, position: int) -> bool:
        """See :meth:`Virtqueue.reached`."""
        return not self._left and self._ring.reached(position)

    def counters(self) -> dict[str, int]:
        """See :meth:`Virtqueue.counters`."""
        counters = self._ring.counters()
        counters["popped"] += self._replay.in_hand
        return counters

    # ---- inside ------------------------------------------------------------------------------------

    def _refused(self, chain: Chain, written: int) -> bool:
        """Whether this is nothing to be noted, but for the ring to refuse or to drop."""
        dead = self._ring.dead
        if not dead and chain in self._entries and 0 <= written <= chain.writable:
            return False
        self._ring.push(chain, written)
        if dead:
            # It stays noted as in flight: that is what it is.
            self._entries.pop(chain, None)
            self._old.discard(chain)
        return True

    def _give(self, batch: Sequence[tuple[Chain, int]]) -> None:
        entries = [self._entries.pop(chain) for chain, _ in batch]
        if self._old:
            self._old.difference_update(chain for chain, _ in batch)
        self._tracker.giving(entries)
        ring = self._ring
        before = ring.pushed
        if len(batch) == 1:
            ring.push(*batch[0])
        else:
            ring.push_together(batch)
        if ring.pushed != before:
            # Otherwise the queue was ended meanwhile, from elsewhere: they are in flight still.
            self._tracker.given(entries)


#: The arguments of a ring's constructor behind its rings: memory, features and the three callbacks.
Connections = tuple[GuestMemory, int, Callable[[], None], Callable[[BaseException], None], Callable[[], None]]


def split_queue(
    index: int, rings: SplitRings, connections: Connections, tracker: Inflight, position: int
) -> TrackedQueue:
    """A tracked split queue. Raises GuestError when ``position`` or the tracker's memory make no sense."""
    position, left = tracker.recover(position, rings.used)
    ring = SplitQueue(index, rings, *connections, position)
    private = SplitRings.private(rings.size, rings.table)
    for number, taken in enumerate(left[: rings.size]):
        private.avail[2 + number] = taken.entry
    private.avail[1] = len(left[: rings.size])
    replay = SplitQueue(index, private, *_silent(connections))
    return TrackedQueue(ring, tracker, replay, private, left)


def packed_queue(
    index: int, rings: PackedRings, connections: Connections, tracker: Inflight, position: int
) -> TrackedQueue:
    """A tracked packed queue. Raises GuestError when ``position`` or the tracker's memory make no sense."""
    position, left = tracker.recover(position, rings.flags)
    ring = PackedQueue(index, rings, *connections, position)
    # Killed amid a batch, whose first element is stored last, a device leaves the others behind it: once
    # that place is used the driver would find them.
    end, begin = packed_start(position, rings.size)
    for count in range(begin, end):
        lap, slot = divmod(count, rings.size)
        flags = rings.flags[slot]
        if flags & (_AVAIL | _USED) == (0 if lap & 1 else _AVAIL | _USED):
            rings.flags[slot] = flags ^ _USED
    table = b""
    for taken in left:
        more = len(taken.descriptors)
        for address, length, ident, flags in taken.descriptors:
            more -= 1
            flags &= ~(_NEXT | _AVAIL | _USED)
            table += _DESCRIPTOR(address, length, ident, flags | _AVAIL | (_NEXT if more else 0))
    # As long as the queue, as chains may be; what is behind the last of them is not available.
    table = table[: 16 * rings.size].ljust(16 * rings.size, b"\0")
    private = PackedRings.private(table)
    replay = PackedQueue(index, private, *_silent(connections))
    return TrackedQueue(ring, tracker, replay, private, left)


def _silent(connections: Connections) -> Connections:
    memory, features, _, on_error, again = connections
    return memory, features, lambda: None, on_error, again
