"""The split virtqueue, device side (virtio 1.4, 2.7).

Every buffer address goes through ``GuestMemory.view``, or through the same check against the
largest region, inlined; every walk is bounded by the queue size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from qvmcore.errors import BadDescriptorChain, GuestMemoryError
from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.position import split_start
from qvmcore.virtio.ring import LONGEST, RingQueue
from qvmcore.virtio.rings import SplitRings

__all__ = ["SplitQueue", "SplitRings"]

_FORMAT = struct.Struct("<QIHH")
_DESCRIPTOR, _ROWS = _FORMAT.unpack_from, _FORMAT.iter_unpack
_NEXT, _WRITE, _INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT
#: How many descriptors a walk looks at: a chain's, and a reference to a table. It is also how a loop ends.
_STEPS = range(LONGEST + 1)


class SplitQueue(RingQueue):
    """A split virtqueue; see :class:`RingQueue`. What is stored in the rings wraps at 65536."""

    __slots__ = ("_avail", "_elements", "_mask", "_offered", "_table", "_used")

    def __init__(
        self,
        index: int,
        rings: SplitRings,
        memory: GuestMemory,
        features: int,
        interrupt: Callable[[], None],
        on_error: Callable[[BaseException], None],
        again: Callable[[], None],
        position: int | None = None,
    ) -> None:
        super().__init__(index, rings.size, memory, features, interrupt, on_error, again)
        self._mask = rings.size - 1
        self._map(rings)
        if position is not None:
            # The used index is in guest memory, where an earlier device has left it.
            self._start(*split_start(position, rings.used[1], rings.size))
        self._offered = self._last  # chains known to be offered

    def _map(self, rings: SplitRings) -> None:
        self._table = rings.table
        self._avail = rings.avail
        self._used = rings.used
        self._elements = rings.used_elements

    def rebind(self, rings: SplitRings, memory: GuestMemory) -> None:
        """See :meth:`Virtqueue.rebind`."""
        self._adopt(memory)
        self._map(rings)

    @property
    def position(self) -> int:
        """See :attr:`Virtqueue.position`; the available index."""
        return self._last & 0xFFFF

    def pop(self) -> Chain | None:
        """See :meth:`Virtqueue.pop`. The fast path of every device: keep it flat."""
        if self._closed:
            return None
        last = self._last
        if last == self._offered and not self._look():
            return None
        size = self.size
        head = index = self._avail[2 + (last & self._mask)]
        view = self._view
        start, span, ram = self._region
        table = self._table
        entries = size
        readers: list[memoryview] = []
        writers: list[memoryview] = []
        roms = self._roms
        readable = writable = 0
        try:
            for _ in _STEPS:
                if index >= entries:
                    raise BadDescriptorChain(f"descriptor index {index} is beyond the {entries} of its table")
                address, length, flags, following = _DESCRIPTOR(table, index << 4)
                if flags & _INDIRECT:
                    # The reference's own WRITE flag means nothing (2.7.5.3.2).
                    if table is not self._table:
                        raise BadDescriptorChain("indirect descriptor inside an indirect table")
                    self._check_table(length, flags)
                    table = view(address, length)
                    straight = None if readers or writers or roms else self._straight(table)
                    if straight is not None:
                        readers, readable, writers, writable = straight
                        break
                    entries = length >> 4
                    index = 0
                    continue
                # A buffer of no bytes is legal and useless: it is skipped.
                if flags & _WRITE:
                    if length:
                        writable += length
                        offset = address - start
                        end = offset + length
                        if offset >= 0 and end <= span:
                            writers.append(ram[offset:end])
                        else:
                            writers.append(view(address, length))
                        if roms:
                            self._refuse_rom(address, length)
                elif writers:
                    raise BadDescriptorChain("device-readable descriptor behind a device-writable one")
                elif length:
                    readable += length
                    offset = address - start
                    end = offset + length
                    if offset >= 0 and end <= span:
                        readers.append(ram[offset:end])
                    else:
                        readers.append(view(address, length))
                if not flags & _NEXT:
                    break
                index = following
            else:
                raise BadDescriptorChain(f"chain longer than {LONGEST} descriptors")
            if readable + writable > spec.CHAIN_BYTES_MAX:
                raise BadDescriptorChain(f"chain of {readable + writable} bytes exceeds 2^32")
        except (BadDescriptorChain, GuestMemoryError) as error:
            self._fail(f"descriptor chain {head}: {error}")
        self._last = last + 1
        chain = self._newest = Chain(self, head, readers, readable, writers, writable)
        return chain

    def _straight(self, table: memoryview) -> tuple[list[memoryview], int, list[memoryview], int] | None:
        """Readers, their bytes, writers, theirs: of an indirect table whose entries follow one another.

        As drivers make them. None for any other, also for a wrong one: :meth:`pop` goes from entry to entry.
        """
        view = self._view
        start, span, ram = self._region
        readers: list[memoryview] = []
        writers: list[memoryview] = []
        readable = writable = 0
        for count, (address, length, flags, following) in enumerate(_ROWS(table), 1):
            offset = address - start
            end = offset + length
            if flags & _INDIRECT or not length or count > LONGEST:
                return None
            buffer = ram[offset:end] if offset >= 0 and end <= span else view(address, length)
            if flags & _WRITE:
                writable += length
                writers.append(buffer)
            elif writers:
                return None
            else:
                readable += length
                readers.append(buffer)
            if not flags & _NEXT:
                return readers, readable, writers, writable
            if following != count:
                return None
        return None

    def push(self, chain: Chain, written: int | None = None) -> None:
        """See :meth:`Virtqueue.push`. The element is stored before the index that shows it (2.7.8.2)."""
        if self._dead:
            self._drop(chain)
            return
        if written is None:
            written = chain.written
        if not 0 <= written <= chain.writable:
            raise ValueError(f"queue {self.index}: {written} bytes written of {chain.writable} writable")
        if chain._queue is not self:
            self._refuse_push(chain)
            return
        chain._queue = None
        pushed = self._pushed
        # The length field has 32 bits; a buffer of exactly 2^32 bytes is under-reported (2.7.8.2 note).
        if written > 0xFFFFFFFF:
            written = 0xFFFFFFFF
        self._elements[pushed & self._mask] = chain.head | written << 32
        self._pushed = pushed = pushed + 1
        self._used[1] = pushed & 0xFFFF
        if pushed == self._signal_at:
            self._signal()

    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        """See :meth:`Virtqueue.push_together`: all elements, then the one index that shows them."""
        pushed = self._pushed
        if self._dead:
            self._drop_all(used)
            return
        for chain, written in used:
            if self._returned(chain, written):
                self._elements[pushed & self._mask] = chain.head | min(written, 0xFFFFFFFF) << 32
                pushed += 1
        if pushed != self._pushed:
            self._pushed = pushed
            self._used[1] = pushed & 0xFFFF

    @property
    def pending(self) -> int:
        """See :attr:`Virtqueue.pending`; a nonsensical index counts as a full ring until it is popped."""
        return 0 if self._closed else min((self._avail[1] - self._last) & 0xFFFF, self.size)

    def reached(self, position: int) -> bool:
        """See :meth:`Virtqueue.reached`; the position is the available index."""
        return not self._closed and self._last & 0xFFFF == position

    def _look(self) -> bool:
        """Whether the driver offers more. When not, it has been told to notify us of the next."""
        last = self._last
        seen = self._avail[1]
        if seen == last & 0xFFFF:
            # Everything is served: ask to be woken by the next chain, then look once more, or a
            # chain offered just before the driver could see that would lie there unnoticed.
            if self._event_idx:
                self._used[2 + 4 * self.size] = seen
            else:
                self._used[0] = 0
            with self._fence:
                pass
            seen = self._avail[1]
            if seen == last & 0xFFFF:
                return False
        new = (seen - last) & 0xFFFF
        # A driver can neither take chains back (2.7.6.1) nor offer more than it has descriptors,
        # and those of the chains in flight are not free.
        in_flight = last - self._pushed
        if new + in_flight > self.size:
            self._fail(f"{new} chains offered with {in_flight} in flight and a queue size of {self.size}")
        if not self._event_idx:
            self._used[0] = spec.VIRTQ_USED_F_NO_NOTIFY
        # A driver may offer as fast as the device serves: a queue's worth, then others get a turn.
        self._offered = min(last + new, self._budget)
        self._more = self._offered == last
        self._batch(new)
        return not self._more

    def _wanted(self, new: int) -> bool:
        """Suppression as 2.7.7.2 says."""
        if self._event_idx:
            # The driver wants to know when the element at used_event is among the new ones.
            return new > (self._pushed - 1 - self._avail[2 + self.size]) & 0xFFFF
        return not self._avail[0] & spec.VIRTQ_AVAIL_F_NO_INTERRUPT

    def _rewind(self, chain: Chain) -> None:
        """The position is all there is."""
