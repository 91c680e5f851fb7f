"""What the split and the packed virtqueue have in common, device side (virtio 1.4, 2.6).

Positions count up without wrapping; only what is stored in the rings wraps. Every piece of ring
state a guest can write is loaded once for each decision, so it cannot change between check and use.

Memory order: the interpreter neither reorders nor splits these accesses, with a GIL or without: an item
of a memoryview of 2, 4 or 8 bytes is one load or store of that size. x86 keeps loads and stores in program
order. The one order x86 does not keep, a store followed by a load of another address, matters twice
(publish then ask for suppression, 2.7.13.4.1; re-arm then look again, 2.7.10) and gets a locked
instruction between: taking a lock that nobody holds is one, a compare-and-exchange, and a full barrier
there. A GIL would not do: the other side is a guest, or another process.
"""

from __future__ import annotations

import abc
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import PER_THREAD, GuestMemory
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.queue import Virtqueue

if sys.byteorder != "little":
    raise ImportError("qvmcore.virtio reads the little-endian rings directly: little-endian hosts only")


#: Descriptors of a chain. A chain must not be longer than its queue (2.7.5.3.1, 2.8.19), but Linux makes its
#: indirect tables as long as the device takes segments, whatever the size of the queue a VMM chose.
LONGEST = 1024
#: The driver is told of a batch of fewer chains once; of a larger one in so many parts.
WHOLE, PARTS = 8, 4


class RingQueue(Virtqueue):
    """A virtqueue between DRIVER_OK and reset, whatever its format.

    ``interrupt()`` signals a used buffer notification; ``on_error(error)`` is told of a broken
    ring before BadDescriptorChain is raised; ``again()`` has the device come back for what a driver
    that never stops offering left behind.
    """

    __slots__ = (
        "_again", "_begin", "_budget", "_closed", "_dead", "_dropped", "_event_idx", "_fence", "_indirect",
        "_interrupt", "_interrupts", "_last", "_more", "_newest", "_on_error", "_part", "_pushed", "_region",
        "_roms", "_signal_at", "_signalled", "_view",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        size: int,
        memory: GuestMemory,
        features: int,
        interrupt: Callable[[], None],
        on_error: Callable[[BaseException], None],
        again: Callable[[], None],
    ) -> None:
        self.index = index
        self.size = size
        self._adopt(memory)
        self._event_idx = bool(features >> spec.VIRTIO_F_EVENT_IDX & 1)
        self._indirect = bool(features >> spec.VIRTIO_F_INDIRECT_DESC & 1)
        self._interrupt = interrupt
        self._on_error = on_error
        self._again = again
        self._fence = threading.Lock()
        self._dead = False
        self._closed = False  # pop() gives nothing; a dead queue is closed, too
        self._more = False  # pop() stopped at the budget
        self._interrupts = 0
        self._dropped = 0  # chains pushed after the end
        self._start(0, 0)

    def _adopt(self, memory: GuestMemory) -> None:
        self._newest: Chain | None = None  # it may be in other memory
        self._view = memory.view
        # The largest region holds nearly every buffer; checked here it saves a call per descriptor.
        largest = max(memory.regions, key=lambda region: region.size)
        # Its view is that of this thread, though: where each has its own, the call is made.
        self._region = (largest.start, 0 if PER_THREAD else largest.size, largest.view)
        self._roms = tuple((region.start, region.end) for region in memory.regions if region.rom)

    def _start(self, last: int, pushed: int) -> None:
        """Begin with the counts at these values; what lies between is in flight and nobody's."""
        self._begin = (last, pushed)
        self._last = last  # chains popped
        self._pushed = pushed
        self._signalled = pushed  # value of _pushed at the last signal
        self._part = WHOLE  # chains after which the driver is told, though the batch goes on
        self._signal_at = pushed + WHOLE  # value of _pushed then
        self._budget = last + self.size  # where pop() stops giving chains before the next notify()

    def unpop(self, chain: Chain) -> None:
        """See :meth:`Virtqueue.unpop`."""
        if self._dead:
            return
        if chain is not self._newest or chain._queue is not self:
            raise ValueError(f"queue {self.index}: chain {chain.head} is not the one popped last")
        chain._queue = self._newest = None
        self._last -= 1
        self._rewind(chain)

    def unpop_all(self, chains: Sequence[Chain]) -> None:
        """See :meth:`Virtqueue.unpop_all`."""
        if self._dead:
            return
        for chain in reversed(chains):
            if self._newest is None or chain._queue is not self or chains[-1] is not self._newest:
                raise ValueError(f"queue {self.index}: chain {chain.head} is not among those popped last")
            chain._queue = None
            self._last -= 1
            self._rewind(chain)
        if chains:
            self._newest = None

    def notify(self) -> None:
        """See :meth:`Virtqueue.notify`."""
        if self._dead:
            return
        self._budget = self._last + self.size
        if self._more:
            self._more = False
            self._again()
        self._signal()

    def _batch(self, new: int) -> None:
        """``new`` chains are there: once they are back the driver is told, before anybody looks for more.

        Of a large batch in parts, so that the driver is at work while we are.
        """
        self._part = new if new < WHOLE else -(-new // PARTS)
        self._signal_at = self._pushed + self._part

    def _signal(self) -> None:
        """Interrupt the driver if it wants to know of what was pushed since the last time."""
        new = self._pushed - self._signalled
        if not new:
            return
        self._signalled = self._pushed
        self._signal_at = self._pushed + self._part
        with self._fence:
            pass
        if self._wanted(new):
            self._interrupts += 1
            self._interrupt()

    def interrupt(self) -> None:
        """Interrupt the driver, whatever it asked for: when it is not known what it was told."""
        if not self._dead:
            self._interrupts += 1
            self._interrupt()

    @property
    def pushed(self) -> int:
        """Changes with each chain that is really given back."""
        return self._pushed

    def limit(self, chains: int) -> None:
        """See :meth:`Virtqueue.limit`."""
        self._budget = self._last + chains

    def kill(self) -> None:
        """See :meth:`Virtqueue.kill`."""
        self._closed = True
        self._dead = True
        # It refers to the queue: both would hold guest memory until garbage is collected.
        self._newest = None

    def close(self) -> None:
        """See :meth:`Virtqueue.close`."""
        self._closed = True

    @property
    def in_hand(self) -> int:
        """See :attr:`Virtqueue.in_hand`."""
        # The other order would miss a chain that is popped between the two loads.
        back = self._pushed + self._dropped
        last, pushed = self._begin
        return self._last - last - back + pushed

    @property
    def dead(self) -> bool:
        """Whether the queue has ended."""
        return self._dead

    def counters(self) -> dict[str, int]:
        """See :meth:`Virtqueue.counters`."""
        last, pushed = self._begin
        return {
            "popped": self._last - last,
            "pushed": self._pushed - pushed,
            "interrupts": self._interrupts,
        }

    # ---- of the format -----------------------------------------------------------------------

    @abc.abstractmethod
    def _wanted(self, new: int) -> bool:
        """Whether the driver wants a notification of the ``new`` chains pushed last."""

    @abc.abstractmethod
    def _rewind(self, chain: Chain) -> None:
        """Take the place in the ring back to that of the chain popped last."""

    # ---- refusals ----------------------------------------------------------------------------

    def _fail(self, message: str) -> NoReturn:
        error = BadDescriptorChain(f"queue {self.index}: {message}")
        # What was served before the error still reaches the driver.
        self.notify()
        self.kill()
        self._on_error(error)
        try:
            raise error from None
        finally:
            # It holds this frame by its traceback: a circle, in which views of guest memory live on.
            del error

    def _check_table(self, length: int, flags: int) -> None:
        """The rules of 2.7.5.3.1 and 2.8.19 for a descriptor that refers to an indirect table."""
        if not self._indirect:
            raise BadDescriptorChain("indirect descriptor, but VIRTIO_F_INDIRECT_DESC was not negotiated")
        if flags & spec.VIRTQ_DESC_F_NEXT:
            raise BadDescriptorChain("indirect descriptor with NEXT set")
        if length & 15 or not length:
            raise BadDescriptorChain(f"indirect table of {length} bytes, not of 16-byte entries")

    def _refuse_rom(self, address: int, length: int) -> None:
        for start, end in self._roms:
            if address < end and start < address + length:
                raise BadDescriptorChain(f"device-writable buffer at {address:#x} is read-only memory")

    def _returned(self, chain: Chain, written: int) -> bool:
        """The checks of a push that is not a fast path; False for a chain to be dropped."""
        if not 0 <= written <= chain.writable:
            raise ValueError(f"queue {self.index}: {written} bytes written of {chain.writable} writable")
        if chain._queue is not self:
            self._refuse_push(chain)
            return False
        chain._queue = None
        return True

    def _drop(self, chain: Chain) -> None:
        """A chain comes back after the end: it is in hand no more, and that is all."""
        if chain._queue is self and chain._count:
            chain._count = 0
            self._dropped += 1

    def _drop_all(self, used: Sequence[tuple[Chain, int]]) -> None:
        """Asked for once a batch: what ends the queue from elsewhere must not cut a batch in two."""
        for chain, _ in used:
            self._drop(chain)

    def _refuse_push(self, chain: Chain) -> None:
        """A chain of an earlier life is dropped in silence; anything else is a bug of the device."""
        owner = chain._queue
        if owner is None or not owner.dead:
            raise ValueError(f"queue {self.index}: chain {chain.head} was pushed twice, or elsewhere")
        if isinstance(owner, RingQueue):
            owner._drop(chain)
