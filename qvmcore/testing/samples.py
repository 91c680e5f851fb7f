"""A small virtio device to try the kit, a driver or an engine on: what goes in comes out."""

from __future__ import annotations

import threading

from qvmcore.virtio.chain import Chain
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.queue import Virtqueue


class Echo(VirtioVdev):
    """Copies the readable bytes of each chain to its writable ones. Two queues, both the same.

    The configuration is a 64-bit ``value`` and 4 bytes the driver may write. Clear ``gate`` to make
    the worker block inside ``handle_queue``; ``entered`` tells that it does.
    """

    vdev_type = "echo"
    summary = "sends back what it is given"
    device_id = 42
    queue_sizes = (64, 16)

    value = 0x1122334455667788
    scratch = bytes(4)

    def on_configured(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.lives: list[str] = []

    def device_features(self) -> int:
        return 1 | 1 << 100

    def config_space(self) -> bytes:
        return self.value.to_bytes(8, "little") + self.scratch

    def config_write(self, offset: int, data: bytes) -> None:
        if offset >= 8:
            start = offset - 8
            self.scratch = self.scratch[:start] + data + self.scratch[start + len(data) :]

    def on_activate(self, features: int) -> None:
        self.lives.append("active")

    def on_queue_reset(self, index: int) -> None:
        self.lives.append(f"queue {index} reset")

    def on_deactivate(self) -> None:
        self.scratch = bytes(4)
        self.lives.append("inactive")

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        for chain in queue:
            if not self.gate.is_set():
                self.entered.set()
                self.gate.wait()
            self._echo(chain)
            queue.push(chain)

    def _echo(self, chain: Chain) -> None:
        # A piece at a time: what a chain claims to hold may be far more than a host should copy.
        while chain.written < chain.writable and (piece := chain.read(65536)):
            chain.write(piece)
