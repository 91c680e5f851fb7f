"""The driver-visible parameters of one virtqueue while it is being set up (virtio 1.4, 3.1.1, 4.2.3.2)."""

from __future__ import annotations

from collections.abc import Callable

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec
from qvmcore.virtio.in_order import InOrderQueue
from qvmcore.virtio.inflight import Inflight
from qvmcore.virtio.packed import PackedQueue
from qvmcore.virtio.position import PACKED_FRESH, packed_given
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.rings import PackedRings, SplitRings
from qvmcore.virtio.split import SplitQueue
from qvmcore.virtio.tracked import packed_queue, split_queue


class QueueSetup:
    """Size in entries and the three guest-physical addresses, as the driver last wrote them.

    ``size_max`` is what the device offers. What is written is checked when the queue is enabled,
    so half-written addresses do no harm. ``resetting`` is what the driver reads while a reset of
    this queue alone is under way, ``reopened`` that it may be set up again after one (2.6.1).
    vCPU threads only, under the state's control lock.
    """

    __slots__ = (
        "_packed", "_rings", "desc", "device", "driver", "ready", "reopened", "resetting", "size", "size_max",
    )  # fmt: skip

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.reset()

    def reset(self) -> None:
        """Forget everything the driver wrote."""
        self.size = self.size_max
        self.desc = self.driver = self.device = 0
        self.ready = self.resetting = self.reopened = False
        self._packed = False
        self._rings: SplitRings | PackedRings | None = None

    def enable(self, memory: GuestMemory, features: int) -> None:
        """Check everything and set ``ready``. Raises GuestError when the queue cannot work."""
        size = self.size
        packed = self._packed = bool(features >> spec.VIRTIO_F_RING_PACKED & 1)
        if not 0 < size <= self.size_max or (size & (size - 1) and not packed):
            kind = "" if packed else " a power of two"
            raise BadDescriptorChain(f"size {size} is not{kind} up to {self.size_max}")
        self._rings = self._find(memory)
        self.ready = True

    def _find(self, memory: GuestMemory) -> SplitRings | PackedRings:
        kind = PackedRings if self._packed else SplitRings
        return kind(memory, self.size, self.desc, self.driver, self.device)

    def rebind(self, memory: GuestMemory, queue: Virtqueue) -> None:
        """Guest memory has moved: give ``queue``, made from this, its rings where they are now.

        Raises GuestError when they are there no more; the queue is then as it was, in the old memory.
        """
        queue.rebind(self._find(memory), memory)

    def make(
        self,
        index: int,
        memory: GuestMemory,
        features: int,
        interrupt: Callable[[], None],
        on_error: Callable[[BaseException], None],
        again: Callable[[], None],
        *,
        position: int | None = None,
        inflight: Inflight | None = None,
    ) -> Virtqueue:
        """The queue in the format the features ask for; it must have been enabled with them.

        ``position`` is where it begins, as :attr:`Virtqueue.position` has it; None is a ring nobody has
        served yet. ``inflight`` keeps account of the chains in hand, and may know of some to be served first.
        Raises GuestError when either makes no sense.
        """
        # Kept no longer than needed: the memory they are in may be replaced.
        rings, self._rings = self._rings, None
        assert rings is not None
        queue: Virtqueue
        connections = memory, features, interrupt, on_error, again
        if isinstance(rings, PackedRings):
            position = PACKED_FRESH if position is None else packed_given(position, rings.flags)
            if inflight is None:
                queue = PackedQueue(index, rings, *connections, position)
            else:
                queue = packed_queue(index, rings, connections, inflight, position)
        elif inflight is None:
            queue = SplitQueue(index, rings, *connections, position)
        else:
            queue = split_queue(index, rings, connections, inflight, position or 0)
        return InOrderQueue(queue) if features >> spec.VIRTIO_F_IN_ORDER & 1 else queue
