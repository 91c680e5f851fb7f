"""The control queues of a console with several ports (virtio 1.4, 5.3.6.2).

What is still to be told to the driver is kept as a set of (port, event), not as a list of messages:
a driver that asks again and again, and takes nothing, cannot make it grow, and what it finally
gets is the state of that moment.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvm_virtio_console import spec
from qvm_virtio_console.port import Port
from qvm_virtio_console.spec import Event
from qvmcore.api import Virtqueue


class Control:
    """The device's side of the control queues. Worker thread; :meth:`forget` while it is held."""

    def __init__(self, ports: Sequence[Port]) -> None:
        self._ports = ports
        self._pending: dict[tuple[int, Event], None] = {}
        #: Messages of the driver that made no sense, and buffers too small for a message.
        self.errors = 0

    def forget(self) -> None:
        """The driver is gone; it is told nothing more."""
        self._pending.clear()

    def tell(self, port: Port, event: Event) -> None:
        """Tell the driver about a port it knows to be ready; the caller delivers."""
        if port.ready:
            self._pending[port.number, event] = None

    def receive(self, queue: Virtqueue) -> None:
        """Messages of the driver. What makes no sense is counted and changes nothing."""
        for chain in queue:
            message = chain.read(spec.CONTROL.size)
            if len(message) < spec.CONTROL.size or not self._understood(*spec.CONTROL.unpack(message)):
                self.errors += 1
            queue.push(chain, 0)

    def deliver(self, queue: Virtqueue) -> None:
        """Messages to the driver, as many as it has buffers for."""
        while self._pending and (chain := queue.pop()) is not None:
            number, event = next(iter(self._pending))
            port = self._ports[number]
            message = _message(port, event)
            if chain.writable < len(message):
                # Half a message would be misread: the buffer goes back empty, the message waits.
                self.errors += 1
            else:
                del self._pending[number, event]
                chain.write(message)
                port.announced |= event is Event.DEVICE_ADD
            queue.push(chain)

    def _understood(self, number: int, event: int, value: int) -> bool:
        if value > 1:
            return False
        if event == Event.DEVICE_READY:
            for port in self._ports if value else ():
                if not port.announced:
                    self._pending[port.number, Event.DEVICE_ADD] = None
            return True
        if number >= len(self._ports) or not self._ports[number].announced:
            return False
        port = self._ports[number]
        if event == Event.PORT_READY:
            self._port_ready(port, bool(value))
        elif event == Event.PORT_OPEN:
            port.set_guest_open(bool(value))
        else:
            return False
        return True

    def _port_ready(self, port: Port, ready: bool) -> None:
        port.ready = ready
        if not ready:
            # The driver could not make the port: whatever else there is to say, it has no ear for it.
            for event in Event:
                self._pending.pop((port.number, event), None)
            return
        if port.console:
            self.tell(port, Event.CONSOLE_PORT)
        if port.name:
            self.tell(port, Event.PORT_NAME)
        if port.size is not None:
            self.tell(port, Event.RESIZE)
        self.tell(port, Event.PORT_OPEN)


def _message(port: Port, event: Event) -> bytes:
    value = {Event.CONSOLE_PORT: 1, Event.PORT_NAME: 1, Event.PORT_OPEN: int(port.host_open)}.get(event, 0)
    message = spec.CONTROL.pack(port.number, event, value)
    if event is Event.PORT_NAME:
        message += port.name.encode()
    elif event is Event.RESIZE:
        message += spec.RESIZE.pack(*(port.size or (0, 0)))
    return message
