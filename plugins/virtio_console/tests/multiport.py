"""The driver's side of the control queues, for tests (virtio 1.4, 5.3.6.2)."""

from __future__ import annotations

from typing import Any

from qvm_virtio_console import spec
from qvm_virtio_console.device import VirtioConsole
from qvm_virtio_console.spec import Event

from qvmcore.testing.fakes import Plugged

ROOM = 72


class MultiportDriver:
    """A started driver that speaks MULTIPORT; ``said`` holds every message of the device."""

    def __init__(self, device: Plugged[VirtioConsole], buffers: int = 32) -> None:
        self.device = device
        self.driver = device.driver()
        self.driver.start()
        self.said: list[tuple[int, Event, int, bytes]] = []
        self._requests: list[Any] = []
        self.give(buffers)

    def give(self, buffers: int, room: int = ROOM) -> None:
        """Buffers for messages of the device."""
        ring = self.driver.queues[spec.CONTROL_RECEIVEQ]
        for _ in range(buffers):
            self._requests.append(ring.submit([], [room]))

    def raw(self, message: bytes) -> None:
        """Anything at all into the control transmit queue, and what the device answers."""
        ring = self.driver.queues[spec.CONTROL_TRANSMITQ]
        request = ring.submit([message])
        self.listen()
        ring.reap()
        assert request.length == 0

    def say(self, event: int, port: int = 0, value: int = 1) -> None:
        """One control message."""
        self.raw(spec.CONTROL.pack(port, event, value))

    def listen(self) -> list[tuple[int, Event, int, bytes]]:
        """The messages that came since the last call; they are added to ``said``."""
        self.device.settle()
        self.driver.queues[spec.CONTROL_RECEIVEQ].reap()
        new = []
        while self._requests and self._requests[0].done:
            request = self._requests.pop(0)
            data = request.result()[: request.length]
            if data:
                port, event, value = spec.CONTROL.unpack_from(data)
                new.append((port, Event(event), value, data[spec.CONTROL.size :]))
        self.said += new
        return new

    def greet(self) -> None:
        """What Linux does: ready, every added port ready, every console opened."""
        self.say(Event.DEVICE_READY)
        for port in [port for port, event, _, _ in self.said if event is Event.DEVICE_ADD]:
            self.say(Event.PORT_READY, port)
        for port in [port for port, event, _, _ in self.said if event is Event.CONSOLE_PORT]:
            self.say(Event.PORT_OPEN, port)

    def send(self, port: int, data: bytes) -> Any:
        """Output on a port."""
        ring = self.driver.queues[spec.receiveq(port) + 1]
        request = ring.submit([data])
        self.device.settle()
        ring.reap()
        return request

    def room(self, port: int, size: int) -> Any:
        """A buffer for input of a port; give it to :meth:`got` later."""
        request = self.driver.queues[spec.receiveq(port)].submit([], [size])
        self.device.settle()
        return request

    def got(self, port: int, request: Any) -> bytes | None:
        """The input in a buffer, None while it is still the device's."""
        self.driver.queues[spec.receiveq(port)].reap()
        return request.result()[: request.length] if request.done else None
