"""In-flight tracking in the memory of VHOST_USER_GET/SET_INFLIGHT_FD ("Inflight I/O tracking").

The client keeps the memory, and hands it to the process after this one. Each queue has a region of its
own, laid out as the protocol text has it (``QueueRegionSplit`` and ``QueueRegionPacked``, in the byte
order of the machine). There is no place between two of our stores where being killed loses a chain or
gives one back twice.

The client can write the memory at any time. So it is read once, from a copy, when a queue starts, and
everything in it is checked; afterwards it is only written, and the truth is in objects of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qvm_vhost_user import inflight_packed, inflight_split
from qvmcore.api import ClientError, Descriptor, Taken

#: Regions begin at multiples of this: what two queues write often shares no cache line.
ALIGNMENT = 64


def region_size(size: int, *, packed: bool) -> int:
    """Bytes of the region of one queue with ``size`` entries, up to the next region."""
    return -(-_bytes(size, packed) // ALIGNMENT) * ALIGNMENT


def area_size(queues: int, size: int, *, packed: bool) -> int:
    """Bytes of the regions of ``queues`` queues. All of them 0 is an area nobody has used."""
    return queues * region_size(size, packed=packed)


class QueueInflight:
    """The account of one queue with ``size`` entries; see :class:`qvmcore.api.Inflight`.

    ``view`` is its region of the shared memory, aligned to 8 bytes. It is not touched before
    :meth:`recover`. Raises ClientError when it is too small. Thread: the one that serves the queue.
    """

    __slots__ = ("given", "giving", "recover", "take", "untake")

    recover: Callable[[int, memoryview], tuple[int, Sequence[Taken]]]
    take: Callable[[int, Sequence[Descriptor]], int]
    untake: Callable[[int], None]
    giving: Callable[[Sequence[int]], None]
    given: Callable[[Sequence[int]], None]

    def __init__(self, view: memoryview, *, packed: bool, size: int) -> None:
        needed = _bytes(size, packed)
        if len(view) < needed:
            raise ClientError(
                f"in-flight memory has {len(view)} bytes for a queue of {size}, expected {needed}",
                hint="the memory is that of GET_INFLIGHT_FD, for the largest queue",
            )
        region: inflight_packed.PackedRegion | inflight_split.SplitRegion
        region = (inflight_packed.PackedRegion if packed else inflight_split.SplitRegion)(view, size)
        # The region's own methods: a call for each would cost more than what most of them do.
        self.recover = region.recover
        self.take = region.take
        self.untake = region.untake
        self.giving = region.giving
        self.given = region.given


def _bytes(size: int, packed: bool) -> int:
    if packed:
        return inflight_packed.HEADER + inflight_packed.ENTRY * size
    return inflight_split.HEADER + inflight_split.ENTRY * size
