"""What a device sees of a virtqueue, whatever its format in guest memory (virtio 1.4, 2.6).

A queue object lives from DRIVER_OK to the next reset; then it is dead: it gives no more chains,
and chains pushed late, by a worker that was still busy, are dropped. The next activation makes a
new object, so a stale reference can never touch the new driver's rings.

Thread: the device's worker only. :meth:`Virtqueue.kill` may come from any thread.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

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
    def push(self, chain: Chain, written: int | None = None) -> None:
        """Hand the chain back as used, with ``written`` bytes (default: ``chain.written``).

        Any order. ValueError when the chain is not a popped one of this queue or ``written``
        exceeds its writable bytes: a bug of the device.
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

    @property
    @abc.abstractmethod
    def dead(self) -> bool:
        """Whether the queue has ended."""

    @property
    @abc.abstractmethod
    def pending(self) -> int:
        """How many chains the driver offers that were not popped yet; changes nothing. 0 if dead."""

    @abc.abstractmethod
    def reached(self, position: int) -> bool:
        """Whether everything was popped up to the position a driver notifies of (2.9, next_off and
        next_wrap as one 16-bit number). Any thread, so only a hint. False when dead.
        """

    @abc.abstractmethod
    def counters(self) -> dict[str, int]:
        """``popped``, ``pushed`` and ``interrupts`` since the activation; any thread."""
