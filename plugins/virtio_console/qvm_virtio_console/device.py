"""The virtio console device (virtio 1.4, 5.3): its configuration, and which queue is whose."""

from __future__ import annotations

from collections.abc import Mapping

from qvm_chardev import EscapeActions

from qvm_virtio_console import spec
from qvm_virtio_console.control import Control
from qvm_virtio_console.options import ConsoleOptions
from qvm_virtio_console.port import Port
from qvm_virtio_console.spec import Event
from qvmcore.api import GuestEnd, Phase, VdevContext, VirtioVdev, Virtqueue

#: Seconds the end of a VM waits for a slow receiver to take the last output.
FLUSH_SECONDS = 0.5


class VirtioConsole(VirtioVdev):
    """A console. Output that the host does not take holds the guest back; see qvm-chardev for how long."""

    vdev_type = "virtio-console"
    summary = "a serial console, and further ports, on a terminal, file, pseudo-terminal or socket"
    Options = ConsoleOptions
    device_id = spec.DEVICE_ID
    queue_sizes: tuple[int, ...] = (128, 128)

    def __init__(self, ctx: VdevContext, options: ConsoleOptions) -> None:
        if options.ports:
            # The first port, the two control queues, and a pair for each further port (5.3.2).
            self.queue_sizes = (128,) * (4 + 2 * len(options.ports))
        super().__init__(ctx, options)
        self._first = Port(self, 0, "", options.hostdev, True)
        further = (Port(self, n, p.name, p.hostdev, p.console) for n, p in enumerate(options.ports, 1))
        self._ports = (self._first, *further)
        self._control = Control(self._ports)
        self._features = spec.F_EMERG_WRITE | (spec.F_MULTIPORT if options.ports else 0)
        self._multiport = False
        self._emergency = 0
        self._announce_size = False

    @classmethod
    def claims(cls, options: ConsoleOptions) -> tuple[str, ...]:
        """The terminal, when a port is on it."""
        return options.claims

    def on_configured(self) -> None:
        """Open the host devices; a terminal is raw from here on, until on_terminate."""
        ctx = self.ctx
        escape = EscapeActions.of(ctx) if self.options.escape == "ctrl-a" else None
        for port in self._ports:
            port.open(escape, self._resized, self._connection)
            ctx.on_terminate(
                lambda _end, port=port: port.flush(FLUSH_SECONDS),  # type: ignore[misc]
                phase=Phase.FLUSH,
                deadline=FLUSH_SECONDS + 1.0,
            )
        if self._first.size is not None:
            self._features |= spec.F_SIZE

    def device_features(self) -> int:
        """5.3.3: SIZE with a terminal only, MULTIPORT with further ports only, EMERG_WRITE always."""
        return self._features

    def config_space(self) -> bytes:
        """struct virtio_console_config (5.3.4); the size is that of the first port."""
        columns, rows = self._first.size or (0, 0)
        return spec.CONFIG.pack(columns, rows, len(self._ports), 0)

    def config_write(self, offset: int, data: bytes) -> None:
        """Emergency write (5.3.4): one character, needs no queue and no negotiation."""
        if offset == spec.CONFIG_EMERG_WR_OFFSET and self._first.line is not None:
            self._emergency += 1
            self._first.line.write(data[:1])

    def on_activate(self, features: int) -> None:
        """Without MULTIPORT the one port is open from here on, and Linux waits for its size."""
        self._multiport = bool(features & spec.F_MULTIPORT)
        self._first.guest_open = not self._multiport
        # With MULTIPORT the size is a control message of its own.
        self._announce_size = bool(features & spec.F_SIZE) and not self._multiport

    def on_deactivate(self) -> None:
        """What the old driver said, and was still to be told, is void."""
        self._multiport = False
        self._control.forget()
        for port in self._ports:
            port.forget()

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        """Move bytes in the direction of the queue, as far as both sides allow."""
        if index > spec.TRANSMITQ and not self._multiport:
            # 5.3.2: without the feature these queues do not exist; what is put into them stays there.
            return
        if index == spec.CONTROL_RECEIVEQ:
            self._control.deliver(queue)
        elif index == spec.CONTROL_TRANSMITQ:
            self._control.receive(queue)
            self._tell_driver()
        elif index % 2:
            if index == spec.TRANSMITQ:
                self._announce_size_late(queue)
            self._ports[spec.port_of(index)].transmit(queue)
        else:
            self._ports[spec.port_of(index)].deliver(queue)

    def _announce_size_late(self, queue: Virtqueue) -> None:
        """Not before the first output: only then has Linux without MULTIPORT made the port."""
        if self._announce_size and queue.pending:
            self._announce_size = False
            self.virtio.config_changed(always=True)

    def _tell_driver(self) -> None:
        queue = self.virtio.queue(spec.CONTROL_RECEIVEQ) if self._multiport else None
        if queue is not None:
            self._control.deliver(queue)
            queue.notify()

    def _connection(self, port: Port) -> None:
        """A client of the host side came or went (worker thread)."""
        self._control.tell(port, Event.PORT_OPEN)
        self._tell_driver()

    def _resized(self, port: Port) -> None:
        """The terminal of a port has a new size (worker thread)."""
        size = port.line.size() if port.line is not None else None
        if size is None:
            return
        port.size = size
        self._control.tell(port, Event.RESIZE)
        self._tell_driver()
        if port is self._first:
            self.virtio.config_changed()

    def on_terminate(self, end: GuestEnd) -> None:
        """Give the host devices back; the terminal is as it was."""
        for port in self._ports:
            port.close()

    def status(self) -> Mapping[str, object]:
        """Counters of the host devices, beside those of the queues."""
        further = {port.name: port.status() for port in self._ports[1:]}
        return {
            **super().status(),
            **self._first.status(),
            "emergency": self._emergency,
            **({"ports": further, "control_errors": self._control.errors} if further else {}),
        }
