"""vdev ``virtio-entropy``: random numbers for the guest (virtio 1.4, 5.4)."""

import os
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from qvmcore.api import GuestEnd, HostError, HostPath, Size, Vdev, VirtioVdev, Virtqueue, hookimpl


class EntropyOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the random numbers come from."""

    source: Annotated[HostPath, Meta(description="device or file to read")] = Path("/dev/urandom")
    max_bytes: Annotated[Size, Meta(ge=1, le=1 << 20, description="the most one request gets")] = Size(65536)


class VirtioEntropy(VirtioVdev):
    """Fills each buffer from the source; the guest waits while the source has nothing."""

    vdev_type = "virtio-entropy"
    summary = "random numbers from the host"
    Options = EntropyOptions
    device_id = 4
    queue_sizes = (64,)
    _fd = -1

    def on_configured(self) -> None:
        try:
            self._fd = os.open(self.options.source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise HostError.from_os("open", self.options.source, error) from error

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        for chain in queue:
            try:
                chain.write(os.read(self._fd, min(chain.writable, self.options.max_bytes)))
            except BlockingIOError:
                queue.unpop(chain)
                self.ctx.worker.watch(self._fd, self._refilled)
                return
            if chain.writable and not chain.written:
                raise HostError(f"{self.options.source} has ended, and random numbers are used only once")
            queue.push(chain)

    def _refilled(self) -> None:
        self.ctx.worker.unwatch(self._fd)
        self.virtio.kick(0)

    def on_terminate(self, end: GuestEnd) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@hookimpl
def qvm_vdev_types() -> list[type[Vdev]]:
    return [VirtioEntropy]
