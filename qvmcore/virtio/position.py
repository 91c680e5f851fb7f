"""Where a device begins in a ring that was served before, as vhost-user's SET_VRING_BASE says it.

Split: the available index, 16 bits. The used index is in guest memory. Packed: bits 0 to 14 are the
place of the next available descriptor and bit 15 its wrap counter, bits 16 to 30 and 31 the same for
the next used one. What lies between the two is in the hands of an earlier device, and lost unless
in-flight tracking tells of it. The numbers are a client's: everything is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable

from qvmcore.errors import BadDescriptorChain
from qvmcore.virtio import spec

#: A packed ring nobody has served: both places are 0, both wrap counters 1 (virtio 1.4, 2.8.1).
PACKED_FRESH = 0x8000_8000


def split_start(position: int, used: int, size: int) -> tuple[int, int]:
    """Chains popped and chains pushed to count on from, for an available and a used index.

    Raises BadDescriptorChain when more than the queue's size would be in flight.
    """
    flying = (position - used) & 0xFFFF
    if not 0 <= position <= 0xFFFF or flying > size:
        raise BadDescriptorChain(
            f"available index {position:#x} does not fit a used index of {used:#x} and a queue size of {size}"
        )
    return used + flying, used


def packed_given(position: int, flags: Iterable[int]) -> int:
    """What a client means that gives a position of a packed ring; ``flags`` are its descriptors'.

    There are clients that know the available half only, for a driver that has everything back (the upper
    16 bits are 0 then), and clients that begin with 0 in any format.
    """
    if position == 0 and not any(each & spec.VIRTQ_DESC_F_USED for each in flags):
        # A ring that went round once has used descriptors, or available ones with this bit.
        return PACKED_FRESH
    return position if position >> 16 else position | position << 16


def packed_start(position: int, size: int) -> tuple[int, int]:
    """Descriptors popped and pushed to count on from; even laps are those with a wrap counter of 1.

    Raises BadDescriptorChain for a place outside the ring, or a used one before the available one.
    """
    if not 0 <= position <= 0xFFFF_FFFF:
        raise BadDescriptorChain(f"position {position:#x} has more than 32 bits")
    avail, used = _count(position & 0xFFFF, size), _count(position >> 16, size)
    if avail < used:
        avail += 2 * size
    if avail - used > size:
        raise BadDescriptorChain(f"position {position:#x} has more than {size} descriptors in flight")
    return avail, used


def _count(half: int, size: int) -> int:
    """Descriptors from the start of a lap with a wrap counter of 1."""
    place = half & 0x7FFF
    if place >= size:
        raise BadDescriptorChain(f"place {place} is beyond the {size} descriptors of the ring")
    return place + (0 if half & 0x8000 else size)
