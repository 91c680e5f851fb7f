"""VIRTIO_F_IN_ORDER: buffers come back in the order they were offered (virtio 1.4, 2.7.9, 2.8.8, 6.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from qvmcore.memory import GuestMemory
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.queue import Virtqueue


class InOrderQueue(Virtqueue):
    """A virtqueue around another: what the device pushes early waits for what came before it.

    So a device may finish its requests in any order and need not care. Each chain gets a used
    element of its own: the driver learns every length, and nothing waits for a batch to fill.
    """

    __slots__ = ("_early", "_order", "_ring")

    def __init__(self, ring: Virtqueue) -> None:
        self.index = ring.index
        self.size = ring.size
        self._ring = ring
        self._order: deque[Chain] = deque()  # popped and not given back
        self._early: dict[Chain, int] = {}  # pushed by the device, and the bytes written

    def pop(self) -> Chain | None:
        """See :meth:`Virtqueue.pop`."""
        chain = self._ring.pop()
        if chain is not None:
            self._order.append(chain)
        return chain

    def unpop(self, chain: Chain) -> None:
        """See :meth:`Virtqueue.unpop`."""
        if chain in self._early:
            raise ValueError(f"queue {self.index}: chain {chain.head} was pushed already")
        self._ring.unpop(chain)
        if not self._ring.dead:
            self._order.pop()

    def unpop_all(self, chains: Sequence[Chain]) -> None:
        """See :meth:`Virtqueue.unpop_all`."""
        for chain in chains:
            if chain in self._early:
                raise ValueError(f"queue {self.index}: chain {chain.head} was pushed already")
        self._ring.unpop_all(chains)
        if not self._ring.dead:
            for _ in chains:
                self._order.pop()

    def push(self, chain: Chain, written: int | None = None) -> None:
        """See :meth:`Virtqueue.push`."""
        order, early = self._order, self._early
        if chain in early:
            raise ValueError(f"queue {self.index}: chain {chain.head} was pushed twice")
        if not order or chain is not order[0]:
            if written is None:
                written = chain.written
            if chain not in order or not 0 <= written <= chain.writable:
                # Not ours, or too much: the ring knows what to say.
                self._ring.push(chain, written)
            else:
                early[chain] = written
            return
        self._ring.push(chain, written)
        order.popleft()
        while early and order[0] in early:
            chain = order.popleft()
            self._ring.push(chain, early.pop(chain))

    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        """See :meth:`Virtqueue.push_together`; with what came before them and was pushed already."""
        order, early = self._order, self._early
        for chain, written in used:
            if chain in early:
                raise ValueError(f"queue {self.index}: chain {chain.head} was pushed twice")
            if chain not in order or not 0 <= written <= chain.writable:
                # Not ours, or too much: the ring knows what to say.
                self._ring.push(chain, written)
            else:
                early[chain] = written
        run = []
        while order and order[0] in early:
            chain = order.popleft()
            run.append((chain, early.pop(chain)))
        if run:
            self._ring.push_together(run)

    def notify(self) -> None:
        """See :meth:`Virtqueue.notify`."""
        self._ring.notify()

    def limit(self, chains: int) -> None:
        """See :meth:`Virtqueue.limit`."""
        self._ring.limit(chains)

    def kill(self) -> None:
        """See :meth:`Virtqueue.kill`."""
        self._ring.kill()

    def close(self) -> None:
        """See :meth:`Virtqueue.close`."""
        self._ring.close()

    def rebind(self, rings: Any, memory: GuestMemory) -> None:
        """See :meth:`Virtqueue.rebind`."""
        self._ring.rebind(rings, memory)

    @property
    def position(self) -> int:
        """See :attr:`Virtqueue.position`."""
        return self._ring.position

    @property
    def in_hand(self) -> int:
        """See :attr:`Virtqueue.in_hand`; a chain that waits for earlier ones is in hand."""
        return self._ring.in_hand - (len(self._early) if self._ring.dead else 0)

    @property
    def dead(self) -> bool:
        """Whether the queue has ended."""
        return self._ring.dead

    @property
    def pending(self) -> int:
        """See :attr:`Virtqueue.pending`."""
        return self._ring.pending

    def reached(self, position: int) -> bool:
        """See :meth:`Virtqueue.reached`."""
        return self._ring.reached(position)

    def counters(self) -> dict[str, int]:
        """See :meth:`Virtqueue.counters`; a chain that waits for earlier ones is not pushed yet."""
        return self._ring.counters()
