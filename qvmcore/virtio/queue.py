"""What a device sees of a virtqueue, whatever its format in guest memory (virtio 1.4, 2.6).

A queue object lives from DRIVER_OK to the next reset; then it is dead: it gives no more chains,
and chains pushed late, by a worker that was still busy, are dropped. The next activation makes a
new object, so a stale reference can never touch the new driver's rings.

A queue of a driver that another process runs (vhost-user) may begin and end at any position, and its
memory may move while nobody serves it: :attr:`Virtqueue.position`, :meth:`Virtqueue.close`,
:meth:`Virtqueue.rebind`.

Thread: the device's worker only, but for what says otherwise.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

from qvmcore.memory import GuestMemory
from qvmcore.virtio.chain import Chain


class Virtqueue(abc.ABC):
    """The device side of one virtqueue.

    The usual loop is ``for chain in queue: ...; queue.push(chain)``; the framework calls
    :meth:`notify` when ``handle_queue`` returns. Code that pushes elsewhere notifies itself.
    ``index`` is the queue's number, ``size`` its number of entries.
    """

    __slots__ = ("index", "size")

    index: int
    size: int

    def __iter__(self) -> Iterator[Chain]:
        """Pop chains until :meth:`pop` gives None."""
        return iter(self.pop, None)

    @abc.abstractmethod
    def pop(self) -> Chain | None:
        """The next chain, None when the driver offers none; it will notify of the next one then.

        Driver notifications are off from the first chain until this returns None. It also returns
        None after ``size`` chains without a :meth:`notify`, so that no driver keeps the worker for
        itself; ``notify`` then has ``handle_queue`` called again. A ring or chain
        that breaks the rules puts the device into DEVICE_NEEDS_RESET and raises BadDescriptorChain.
        """

    @abc.abstractmethod
    def unpop(self, chain: Chain) -> None:
        """Give back the chain popped last, unused; the next :meth:`pop` returns it again."""

    @abc.abstractmethod
    def unpop_all(self, chains: Sequence[Chain]) -> None:
        """Give back, unused, those popped last, in the order they were popped; pop() returns them again."""

    @abc.abstractmethod
    def push(self, chain: Chain, written: int | None = None) -> None:
        """Hand the chain back as used, with ``written`` bytes (default: ``chain.written``).

        The driver learns of it at the next :meth:`notify`, or at once when a part of a batch, or all
        that was there, is back. Any order. ValueError when the chain is not a popped one of this
        queue or ``written`` exceeds its writable bytes: a bug of the device.
        """

    @abc.abstractmethod
    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        """Hand several chains back, each with the bytes written: the driver sees all of them or none.

        For an answer that is spread over chains, as a frame over receive buffers (5.1.9.4.1): a
        driver that polls would find a part of it otherwise. ValueError as :meth:`push`.
        """

    @abc.abstractmethod
    def notify(self) -> None:
        """Interrupt the driver if it wants to know of what was pushed since the last call."""

    @abc.abstractmethod
    def limit(self, chains: int) -> None:
        """Have :meth:`pop` give about ``chains`` at most before the next :meth:`notify`. A hint."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End the queue for good: pop gives None, push and notify do nothing. Any thread."""

    @abc.abstractmethod
    def close(self) -> None:
        """Take no more: pop gives None from now on, push and notify go on. For good; any thread."""

    @abc.abstractmethod
    def rebind(self, rings: Any, memory: GuestMemory) -> None:
        """Go on in other memory: the same rings at the same addresses, in ``memory``'s regions.

        ``rings`` are the SplitRings or PackedRings there. Positions stay, and chains in hand can still be
        pushed; their views are of the memory they were popped from. While nobody serves the queue.
        """

    @property
    @abc.abstractmethod
    def position(self) -> int:
        """Where the device is, as vhost-user's GET_VRING_BASE has it (:mod:`qvmcore.virtio.position`).

        Any thread; exact while nobody serves the queue.
        """

    @property
    @abc.abstractmethod
    def in_hand(self) -> int:
        """Chains popped and not pushed yet, on a dead queue too. Any thread; never too few."""

    @property
    @abc.abstractmethod
    def dead(self) -> bool:
        """Whether the queue has ended."""

    @property
    @abc.abstractmethod
    def pending(self) -> int:
        """How many chains the driver offers that were not popped yet; changes nothing.

        0 when the queue is dead or closed.
        """

    @abc.abstractmethod
    def reached(self, position: int) -> bool:
        """Whether everything was popped up to the position a driver notifies of (2.9, next_off and
        next_wrap as one 16-bit number). Any thread, so only a hint. False when dead or closed.
        """

    @abc.abstractmethod
    def counters(self) -> dict[str, int]:
        """``popped``, ``pushed`` and ``interrupts`` since the activation; any thread."""
