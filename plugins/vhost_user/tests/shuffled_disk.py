"""vdev ``shuffled-disk``, for tests: it has many requests in hand and gives them back in any order."""

from __future__ import annotations

import os
import random
from functools import partial
from typing import Annotated

from msgspec import Meta, Struct

from qvmcore.api import Chain, GuestEnd, HostPath, Vdev, VirtioVdev, Virtqueue, hookimpl


class ShuffledOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """The disk."""

    hostdev: Annotated[HostPath, Meta(description="image file")]


class ShuffledDisk(VirtioVdev):
    """Writes requests of virtio-blk to a file. What was taken first may be served last."""

    vdev_type = "shuffled-disk"
    Options = ShuffledOptions
    device_id = 2
    queue_sizes = (64, 64)
    in_order = False
    _fd = -1

    def on_configured(self) -> None:
        self._fd = os.open(self.options.hostdev, os.O_RDWR | os.O_CLOEXEC)
        self._held: list[list[Chain]] = [[], []]

    def config_space(self) -> bytes:
        return (os.fstat(self._fd).st_size // 512).to_bytes(8, "little")

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        held = self._held[index]
        held.extend(queue)
        random.shuffle(held)
        for _ in range(random.randint(0, len(held))):
            chain = held.pop()
            sector = int.from_bytes(chain.read(16)[8:], "little")
            os.pwrite(self._fd, chain.read(), sector * 512)
            chain.write(b"\0")
            queue.push(chain)
        if held:
            self.ctx.worker.call_later(0.0005, partial(self.virtio.kick, index))

    def on_queue_reset(self, index: int) -> None:
        self._held[index].clear()

    def on_deactivate(self) -> None:
        for held in self._held:
            held.clear()

    def on_terminate(self, end: GuestEnd) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@hookimpl
def qvm_vdev_types() -> list[type[Vdev]]:
    return [ShuffledDisk]
