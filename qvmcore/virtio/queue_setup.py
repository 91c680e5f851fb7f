"""The driver-visible parameters of one virtqueue while it is being set up (virtio 1.4, 3.1.1, 4.2.3.2)."""

from __future__ import annotations

from collections.abc import Callable

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import GuestMemory
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
        self._rings: SplitRings | None = None

    def enable(self, memory: GuestMemory) -> None:
        """Check everything and set ``ready``. Raises GuestError when the queue cannot work."""
        size = self.size
        if not 0 < size <= self.size_max or size & (size - 1):
            raise BadDescriptorChain(f"size {size} is not a power of two up to {self.size_max}")
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
        """The queue in the format the features ask for; it must have been enabled."""
        assert self._rings is not None
        return SplitQueue(index, self._rings, memory, features, interrupt, on_error, again)
