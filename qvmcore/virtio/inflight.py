"""In-flight tracking: which chains a device process has in hand, told in memory that outlives it.

A process that is killed loses what it has popped: the driver waits for it for ever. Whoever runs the
driver (a vhost-user client) therefore keeps a piece of memory for each queue, in which the device notes
every chain it takes and gives back; the process after it reads there what is to be served again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Descriptor(NamedTuple):
    """One descriptor of a packed ring: guest-physical address, bytes, buffer ID and flags (2.8.13)."""

    address: int
    length: int
    ident: int
    flags: int


class Taken(NamedTuple):
    """A chain an earlier device took and did not give back.

    ``entry`` is its place in the tracker's memory. On a split ring it is the head, and the descriptors
    are in the table; those of a packed ring may be overwritten there, so they are here.
    """

    entry: int
    descriptors: Sequence[Descriptor] = ()


class Inflight(Protocol):
    """Keeps the account of one queue. Thread: the one that serves the queue; ``recover_*`` before that.

    The order of the calls is what makes it safe to be killed between any two instructions:
    :meth:`take` after a chain was found and before the device sees it; for what is given back,
    :meth:`giving`, then the ring's own stores, of which the last shows it to the driver, then
    :meth:`given`.
    """

    def recover_split(self, position: int, used: int) -> tuple[int, Sequence[Taken]]:
        """Where to begin and what to serve first, in this order.

        ``used`` is the index in the used ring, ``position`` where the client wants to begin: it counts
        for memory in which nothing was noted yet. Raises GuestError when the memory makes no sense.
        """

    def recover_packed(self, position: int, flags: Sequence[int]) -> tuple[int, Sequence[Taken]]:
        """As :meth:`recover_split`; ``flags`` are those of the descriptors in the ring."""

    def take(self, head: int, descriptors: Sequence[Descriptor]) -> int:
        """A chain was popped; its entry. ``descriptors`` are given for a packed ring only."""

    def untake(self, entry: int) -> None:
        """A chain was unpopped."""

    def giving(self, entries: Sequence[int]) -> None:
        """These chains are about to be given back, together."""

    def given(self, entries: Sequence[int]) -> None:
        """They were given back: the same ones as in the last :meth:`giving`."""
