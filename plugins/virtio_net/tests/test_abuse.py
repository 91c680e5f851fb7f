"""Any guest at all against the card, whose own frames come back to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
from qvm_virtio_net import device as device_module
from qvm_virtio_net import spec
from qvm_virtio_net.buffers import fill
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.hostdev import Events, NoCable, Sent
from qvm_virtio_net.testing import Guest, ethernet

from qvmcore.api import Worker
from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged, plug


class Mirror(NoCable):
    """What is sent is received, up to 32 messages of it."""

    offloads = spec.OFFLOADS
    up = True

    def open(self, worker: Worker, events: Events) -> None:
        self._worker, self._events = worker, events
        self._waiting: deque[bytes] = deque(maxlen=32)
        self._paused = False

    def send(self, pair: int, message: Sequence[memoryview]) -> Sent:
        self._waiting.append(b"".join(message))
        self._wake()
        return Sent.TAKEN

    def receive(self, pair: int, buffers: Sequence[bytearray | memoryview]) -> int:
        if not self._waiting:
            return 0
        return fill([memoryview(buffer) for buffer in buffers], self._waiting.popleft())

    def pause(self, pair: int, paused: bool) -> None:
        self._paused = paused
        self._wake()

    def _wake(self) -> None:
        if self._waiting and not self._paused:
            self._worker.call(lambda: self._events.readable(0))


def mirror() -> Plugged[Any]:
    """A card on a mirror."""
    with mock.patch.object(device_module, "make_hostdev", lambda *_: Mirror()):
        return plug(VirtioNet, none=True)


def test_the_mirror_mirrors() -> None:
    with mirror() as device:
        guest = Guest(device)
        guest.offer(2000)
        guest.send(ethernet())
        assert [frame for _, frame, _ in guest.received()] == [ethernet()]


class HostileGuest(VirtioAbuse):
    """Over the registers and the rings; a good guest gets its frame back afterwards."""

    examples = 60

    def device(self) -> Plugged[Any]:
        return mirror()

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        rx, tx = driver.queues[:2]
        wanted = rx.submit([], [2000])
        sent = tx.submit([bytes(12), ethernet(payload=b"good")], [])
        device.settle()
        assert tx.reap() == [sent]
        # What a former guest sent may come first.
        for _ in range(40):
            if wanted in rx.reap():
                return
            device.settle()
        pytest.fail("nothing came back")


TestHostileGuest = HostileGuest.TestCase
