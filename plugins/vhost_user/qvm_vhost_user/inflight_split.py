"""QueueRegionSplit: the in-flight region of a split ring.

======  =====================  =================================================================
offset  field
======  =====================  =================================================================
0       u64 features           0
8       u16 version            1; 0 is memory nobody has used
10      u16 desc_num           entries behind the header: the size of the queue
12      u16 last_batch_head    the entry given back last; each names the one before it
14      u16 used_idx           index of the used ring up to which the entries are right
16      DescStateSplit[]       u8 inflight, 5 unused, u16 next, u64 counter; one for each head
======  =====================  =================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

from qvmcore.api import Descriptor, GuestError, Taken

HEADER, ENTRY = 16, 16
VERSION = 1
_VERSION, _NUMBER, _HEAD, _USED = 4, 5, 6, 7  # as 16-bit cells
#: A number no honest account reaches.
COUNTER_MAX = 1 << 63


class SplitRegion:
    """See :class:`qvmcore.api.Inflight`; ``size`` is the queue's."""

    def __init__(self, view: memoryview, size: int) -> None:
        region = view[: HEADER + ENTRY * size]
        self._size = size
        self._bytes = region
        self._halves = region.cast("H")
        self._words = region.cast("Q")
        self._head = 0
        self._used = 0
        self._counter = 0

    def recover(self, position: int, ring: memoryview) -> tuple[int, Sequence[Taken]]:
        """See :meth:`Inflight.recover`; ``ring`` is the used ring."""
        used = ring[1]
        # A copy: the client can write the memory while we read it.
        region = memoryview(self._bytes.tobytes())
        halves = region.cast("H")
        if halves[_VERSION]:
            left = self._left(region, used)
            if left is not None:
                self._used = used
                self._head = halves[_HEAD]
                return (used + len(left)) & 0xFFFF, [Taken(head) for head in left]
        self._begin(used)
        return position, ()

    def _left(self, region: memoryview, used: int) -> list[int] | None:
        """The heads in flight, in the order they were taken; None when the memory is of another ring."""
        size, halves, counters = self._size, region.cast("H"), region.cast("Q")[HEADER // 8 + 1 :: 2]
        flying = {head for head in range(size) if region[HEADER + ENTRY * head]}
        batch = (used - halves[_USED]) & 0xFFFF
        if halves[_VERSION] != VERSION or halves[_NUMBER] != size or batch > size:
            if not flying:
                return None
            raise GuestError(
                f"in-flight memory of version {halves[_VERSION]}, for {halves[_NUMBER]} entries and used "
                f"index {halves[_USED]:#x}; the ring has {size} entries and used index {used:#x}"
            )
        # The driver has these; whoever gave them back was killed before it could say so here.
        head = halves[_HEAD]
        for _ in range(batch):
            if head >= size:
                raise GuestError(f"in-flight memory names entry {head} of {size}")
            flying.discard(head)
            self._bytes[HEADER + ENTRY * head] = 0
            head = halves[(HEADER + ENTRY * head) // 2 + 3]
        self._halves[_USED] = used
        left = sorted(flying, key=counters.__getitem__)
        if left:
            self._counter = counters[left[-1]] + 1
            if self._counter > COUNTER_MAX:
                raise GuestError(f"in-flight memory counts {self._counter} chains")
        return left

    def _begin(self, used: int) -> None:
        """Nothing is in flight. The version comes last: without it the rest does not count."""
        self._halves[_VERSION] = 0
        self._bytes[:] = bytes(len(self._bytes))
        self._halves[_NUMBER] = self._size
        self._halves[_USED] = self._used = used
        self._halves[_VERSION] = VERSION

    def take(self, head: int, descriptors: Sequence[Descriptor]) -> int:
        """See :meth:`Inflight.take`."""
        self._words[2 * head + 3] = self._counter
        self._counter += 1
        self._bytes[HEADER + ENTRY * head] = 1
        return head

    def untake(self, entry: int) -> None:
        """See :meth:`Inflight.untake`."""
        self._bytes[HEADER + ENTRY * entry] = 0

    def giving(self, entries: Sequence[int]) -> None:
        """See :meth:`Inflight.giving`."""
        for entry in entries:
            self._halves[8 * entry + 11] = self._head
            self._halves[_HEAD] = self._head = entry

    def given(self, entries: Sequence[int]) -> None:
        """See :meth:`Inflight.given`."""
        for entry in entries:
            self._bytes[HEADER + ENTRY * entry] = 0
        self._halves[_USED] = self._used = (self._used + len(entries)) & 0xFFFF
