"""The driver-visible parameters of one virtqueue while it is being set up (virtio 1.4, 3.1.1, 4.2.3.2)."""

from __future__ import annotations

from collections.abc import Callable

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec
from qvmcore.virtio.in_order import InOrderQueue
from qvmcore.virtio.packed import PackedQueue, PackedRings
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.split import SplitQueue, SplitRings


class QueueSetup:
    """Size in entries and the three guest-physical addresses, as the driver last wrote them.

    ``size_max`` is what the device offers. What is written is checked when the queue is enabled,
    so half-written addresses do no harm. ``resetting`` is what the driver reads while a reset of
    this queue alone is under way, ``reopened`` that it may be set up again after one (2.6.1).
    vCPU threads only, under the state's control lock.
    """

    __slots__ = (
        "_rings", "desc", "device", "driver", "ready", "reopened", "resetting", "size", "size_max",
    )  # fmt: skip

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.reset()

    def reset(self) -> None:
        """Forget everything the driver wrote."""
        self.size = self.size_max
        self.desc = self.driver = self.device = 0
        self.ready = self.resetting = self.reopened = False
        self._rings: SplitRings | PackedRings | None = None

    def enable(self, memory: GuestMemory, features: int) -> None:
        """Check everything and set ``ready``. Raises GuestError when the queue cannot work."""
        size = self.size
        packed = features >> spec.VIRTIO_F_RING_PACKED & 1
        if not 0 < size <= self.size_max or (size & (size - 1) and not packed):
            kind = "" if packed else " a power of two"
            raise BadDescriptorChain(f"size {size} is not{kind} up to {self.size_max}")
        if packed:
            self._rings = PackedRings(memory, size, self.desc, self.driver, self.device)
        else:
            self._rings = SplitRings(memory, size, self.desc, self.driver, self.device)
        self.ready = True

    def make(
        self,
        index: int,
        memory: GuestMemory,
        features: int,
        interrupt: Callable[[], None],
        on_error: Callable[[BaseException], None],
        again: Callable[[], None],
    ) -> Virtqueue:
        """The queue in the format the features ask for; it must have been enabled with them."""
        rings = self._rings
        queue: Virtqueue
        if isinstance(rings, PackedRings):
            queue = PackedQueue(index, rings, memory, features, interrupt, on_error, again)
        else:
            assert rings is not None
            queue = SplitQueue(index, rings, memory, features, interrupt, on_error, again)
        return InOrderQueue(queue) if features >> spec.VIRTIO_F_IN_ORDER & 1 else queue
