"""QueueRegionPacked: the in-flight region of a packed ring.

======  ==========================  ============================================================
offset  field
======  ==========================  ============================================================
0       u64 features                0
8       u16 version                 1; 0 is memory nobody has used
10      u16 desc_num                entries behind the header: the size of the queue
12      u16 free_head               first entry of the free list
14      u16 old_free_head           the same before what is under way
16      u16 used_idx                place of the next used descriptor
18      u16 old_used_idx            the same before what is under way
20      u8 used_wrap_counter        its wrap counter
21      u8 old_used_wrap_counter    the same before what is under way
32      DescStatePacked[]           u8 inflight, 1 unused, u16 next, u16 last, u16 num, u64 counter,
                                    u16 id, u16 flags, u32 len, u64 addr; one for each descriptor
======  ==========================  ============================================================

A chain has as many entries as descriptors: its first one says that it is in flight, how many there are,
and which is the last. The free list ends with the number of entries.

The text's fields that belong together are stored together, in one aligned store: both free heads, and
the four of the used place. One after the other, a kill between place and wrap counter would leave a
place that never was.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from qvmcore.api import Descriptor, GuestError, Taken

HEADER, ENTRY = 32, 32
VERSION = 1
_VERSION, _NUMBER, _FREE, _OLD_FREE, _USED, _OLD_USED = 4, 5, 6, 7, 8, 9  # as 16-bit cells
_WRAP, _OLD_WRAP = 20, 21
_FREE_CELL, _USED_CELL = 3, 2  # as 32-bit and as 64-bit cells
#: The flags of a descriptor that is available, with a wrap counter of 1 and of 0 (virtio 1.4, 2.8.1).
_AVAIL_MARK, _USED_MARK = 1 << 7, 1 << 15
_MARKS = _AVAIL_MARK | _USED_MARK
#: A number no honest account reaches.
COUNTER_MAX = 1 << 63
_STATE = struct.Struct("=16xHHIQ")


class PackedRegion:
    """See :class:`qvmcore.api.Inflight`; ``size`` is the queue's."""

    def __init__(self, view: memoryview, size: int) -> None:
        region = view[: HEADER + ENTRY * size]
        self._size = size
        self._bytes = region
        self._halves = region.cast("H")
        self._quads = region.cast("I")
        self._words = region.cast("Q")
        self._free: list[int] = []  # the free list from its end on
        self._chains: dict[int, list[int]] = {}  # the entries of a chain by its first
        self._used = 0  # descriptors given back, from the start of a lap with a wrap counter of 1
        self._new_used = 0  # the same with what is being given back
        self._counter = 0

    def recover(self, position: int, ring: memoryview) -> tuple[int, Sequence[Taken]]:
        """See :meth:`Inflight.recover`; ``ring`` are the flags of the descriptors."""
        # A copy: the client can write the memory while we read it.
        region = memoryview(self._bytes.tobytes())
        halves = region.cast("H")
        if halves[_VERSION] != VERSION or not halves[_NUMBER] == self._size == len(ring):
            if halves[_VERSION] and any(region[HEADER::ENTRY]):
                raise GuestError(
                    f"in-flight memory of version {halves[_VERSION]}, for {halves[_NUMBER]} entries; "
                    f"the ring has {len(ring)}"
                )
            self._begin(position >> 16)
            return position, ()
        free_head = halves[_FREE]
        new = self._count(halves[_USED], region[_WRAP])
        old = self._count(halves[_OLD_USED], region[_OLD_WRAP])
        if new != old and ring[old % self._size] & _MARKS != (
            _USED_MARK if old >= self._size else _AVAIL_MARK
        ):
            # The driver has the last ones; whoever gave them back was killed before it could say so here.
            self._used = new
        else:
            self._used = old
            free_head = halves[_OLD_FREE]
        self._new_used = self._used
        claimed = bytearray(self._size)
        self._free = self._list(halves, free_head, claimed)
        left = self._left(region, claimed)
        # Killed between these, the next one comes to the same.
        self._store_free()
        self._words[_USED_CELL] = self._used_cell()
        for entry in self._free:
            self._bytes[HEADER + ENTRY * entry] = 0
        taken = self._used + sum(len(each.descriptors) for each in left)
        return self._place(taken) | self._place(self._used) << 16, left

    def _list(self, halves: memoryview, entry: int, claimed: bytearray) -> list[int]:
        """The free list from its end on."""
        entries = []
        while entry != self._size:
            self._claim(entry, claimed)
            entries.append(entry)
            entry = halves[ENTRY // 2 * entry + 17]
        return entries[::-1]

    def _left(self, region: memoryview, claimed: bytearray) -> list[Taken]:
        """The chains in flight, in the order they were taken."""
        halves, words = region.cast("H"), region.cast("Q")
        heads = [e for e in range(self._size) if region[HEADER + ENTRY * e] and not claimed[e]]
        heads.sort(key=lambda head: int(words[4 * head + 5]))
        left = []
        for head in heads:
            last, number = halves[16 * head + 18], halves[16 * head + 19]
            entries = []
            entry = head
            for _ in range(number):
                self._claim(entry, claimed)
                entries.append(entry)
                entry = halves[16 * entry + 17]
            if not entries or entries[-1] != last:
                raise GuestError(f"in-flight memory: {number} entries from {head} on do not end at {last}")
            self._chains[head] = entries
            left.append(Taken(head, [_descriptor(region, each) for each in entries]))
        if not all(claimed):
            raise GuestError("in-flight memory has entries that are neither free nor in flight")
        if heads:
            self._counter = words[4 * heads[-1] + 5] + 1
            if self._counter > COUNTER_MAX:
                raise GuestError(f"in-flight memory counts {self._counter} chains")
        return left

    def _claim(self, entry: int, claimed: bytearray) -> None:
        if entry >= self._size or claimed[entry]:
            raise GuestError(f"in-flight memory names entry {entry} twice, or it is beyond the {self._size}")
        claimed[entry] = 1

    def _begin(self, used: int) -> None:
        """Nothing is in flight. The version comes last: without it the rest does not count."""
        size = self._size
        self._halves[_VERSION] = 0
        self._bytes[:] = bytes(len(self._bytes))
        for entry in range(size):
            self._halves[16 * entry + 17] = entry + 1
        self._free = list(range(size))[::-1]
        self._used = self._new_used = self._count(used & 0x7FFF, used >> 15)
        self._words[_USED_CELL] = self._used_cell()
        self._halves[_NUMBER] = size
        self._halves[_VERSION] = VERSION

    def take(self, head: int, descriptors: Sequence[Descriptor]) -> int:
        """See :meth:`Inflight.take`. The free heads come last: until then all this is free."""
        free, words = self._free, self._words
        entries = []
        for address, length, ident, flags in descriptors:
            entry = free.pop()
            entries.append(entry)
            words[4 * entry + 6] = ident | flags << 16 | length << 32
            words[4 * entry + 7] = address
        first, count = entries[0], len(entries)
        rest = free[-1] if free else self._size
        following = entries[1] if count > 1 else rest
        words[4 * first + 5] = self._counter
        self._counter += 1
        words[4 * first + 4] = 1 | following << 16 | entry << 32 | count << 48
        self._chains[first] = entries
        self._quads[_FREE_CELL] = rest * 0x1_0001
        return first

    def untake(self, entry: int) -> None:
        """See :meth:`Inflight.untake`."""
        self._release(entry)
        self._store_free()
        self._bytes[HEADER + ENTRY * entry] = 0

    def giving(self, entries: Sequence[int]) -> None:
        """See :meth:`Inflight.giving`."""
        for entry in entries:
            count = self._release(entry)
            self._halves[_FREE] = entry
            self._new_used = (self._new_used + count) % (2 * self._size)
        self._words[_USED_CELL] = self._used_cell()

    def given(self, entries: Sequence[int]) -> None:
        """See :meth:`Inflight.given`."""
        for entry in entries:
            self._bytes[HEADER + ENTRY * entry] = 0
        # The last of them is the head of the free list.
        self._quads[_FREE_CELL] = entry * 0x1_0001
        self._used = self._new_used
        place = self._place(self._used)
        self._words[_USED_CELL] = (place & 0x7FFF) * 0x1_0001 | (place >> 15) * 0x101 << 32

    def _release(self, entry: int) -> int:
        """Put a chain before the free list, whose head is not stored yet; how many entries it has."""
        entries, free = self._chains.pop(entry), self._free
        self._halves[16 * entries[-1] + 17] = free[-1] if free else self._size
        free += entries[::-1]
        return len(entries)

    @property
    def _head(self) -> int:
        return self._free[-1] if self._free else self._size

    def _store_free(self) -> None:
        self._quads[_FREE_CELL] = self._head * 0x1_0001

    def _used_cell(self) -> int:
        new, old = self._place(self._new_used), self._place(self._used)
        return new & 0x7FFF | (old & 0x7FFF) << 16 | new >> 15 << 32 | old >> 15 << 40

    def _place(self, count: int) -> int:
        """Where the ring is after so many descriptors, with the wrap counter in bit 15."""
        return count % self._size | (0 if count // self._size & 1 else 0x8000)

    def _count(self, place: int, wrap: int) -> int:
        if place >= self._size or wrap > 1:
            raise GuestError(f"in-flight memory: used index {place}, wrap counter {wrap}")
        return place + (0 if wrap else self._size)


def _descriptor(region: memoryview, entry: int) -> Descriptor:
    ident, flags, length, address = _STATE.unpack_from(region, HEADER + ENTRY * entry)
    return address, length, ident, flags
