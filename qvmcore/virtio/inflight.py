"""In-flight tracking: which chains a device process has in hand, told in memory that outlives it.

A process that is killed loses what it has popped: the driver waits for it for ever. Whoever runs the
driver (a vhost-user client) therefore keeps a piece of memory for each queue, in which the device notes
every chain it takes and gives back; the process after it reads there what is to be served again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

#: A descriptor of a packed ring: guest-physical address, bytes, buffer ID and flags (virtio 1.4, 2.8.13).
Descriptor = tuple[int, int, int, int]


class Taken(NamedTuple):
    """A chain an earlier device took and did not give back.

    ``entry`` is its place in the tracker's memory. On a split ring it is the head, and the descriptors
    are in the table; those of a packed ring may be overwritten there, so they are here.
    """

    entry: int
    descriptors: Sequence[Descriptor] = ()


class Inflight(Protocol):
    """Keeps the account of one queue. Thread: the one that serves the queue; :meth:`recover` before that.

    The order of the calls is what makes it safe to be killed between any two instructions:
    :meth:`take` after a chain was found and before the device sees it; for what is given back,
    :meth:`giving`, then the ring's own stores, of which the last shows it to the driver, then
    :meth:`given`.
    """

    def recover(self, position: int, ring: memoryview, /) -> tuple[int, Sequence[Taken]]:
        """Where to begin, as :attr:`Virtqueue.position`, and what to serve first, in this order.

        ``position`` is where the client wants to begin; it counts for memory in which nothing was noted
        yet. ``ring`` are the 16-bit cells of the used ring (split), or the flags of the descriptors
        (packed). Raises GuestError when the memory makes no sense.
        """

    def take(self, head: int, descriptors: Sequence[Descriptor], /) -> int:
        """A chain was popped; its entry. ``descriptors`` are given for a packed ring only."""

    def untake(self, entry: int, /) -> None:
        """A chain was unpopped."""

    def giving(self, entries: Sequence[int], /) -> None:
        """These chains are about to be given back, together."""

    def given(self, entries: Sequence[int], /) -> None:
        """They were given back: the same ones as in the last :meth:`giving`."""
