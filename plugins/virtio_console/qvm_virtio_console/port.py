"""One port of the console: bytes between its two queues and its host device (virtio 1.4, 5.3.6).

Ports share nothing but the worker thread, and no call here waits: a port whose host side is full
keeps the rest of its own chain and comes back when there is room, while the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qvm_chardev import CharDevice, EscapeActions, open_chardev, parse_spec

from qvm_virtio_console import spec
from qvmcore.api import Chain, VirtioVdev, Virtqueue

#: Bytes handed to the host device at a time, between two looks whether the driver reset the device.
PIECE = 64 * 1024


class Port:
    """Port ``number`` of ``owner``. ``name`` is empty for the first.

    ``guest_open``: the guest takes input; a guest that has not opened a port loses what it is given,
    so input waits on the host side until then. ``announced`` and ``ready`` belong to the control
    queues. Worker thread, except for :meth:`forget`, which runs while the worker is held.
    """

    def __init__(self, owner: VirtioVdev, number: int, name: str, hostdev: str, console: bool) -> None:
        self.number = number
        self.name = name
        self.console = console
        self.size: tuple[int, int] | None = None
        self.announced = self.ready = self.guest_open = False
        self._owner = owner
        self._hostdev = parse_spec(hostdev)
        self._label = hostdev
        self.host_open = not self._hostdev.has_clients
        self.line: CharDevice | None = None
        self._input = bytearray()
        # A transmitted chain that the host took only in part: it, its views, and the bytes taken.
        self._partial: tuple[Chain, list[memoryview], int] | None = None

    def open(
        self,
        escape: EscapeActions | None,
        on_resize: Callable[[Port], None],
        on_connection: Callable[[Port], None],
    ) -> None:
        """Open the host device. Raises HostError."""

        def connection(connected: bool) -> None:
            self.host_open = connected
            on_connection(self)

        ctx = self._owner.ctx
        self.line = open_chardev(
            self._hostdev,
            worker=ctx.worker,
            on_input=self._received,
            on_writable=lambda: self._owner.virtio.kick(spec.receiveq(self.number) + 1),
            on_resize=lambda: on_resize(self),
            on_connection=connection,
            log=ctx.log,
            name=f"{ctx.name}.{self.name}" if self.name else ctx.name,
            escape=escape,
            base=ctx.base_dir,
            # A Linux guest spins while a console holds it back, but lets a program at a port sleep.
            lossless=not self.console,
        )
        self.size = self.line.size()

    def forget(self) -> None:
        """The driver is gone: the rest of its chain is not sent, and nothing is announced or open."""
        self._partial = None
        self.announced = self.ready = self.guest_open = False

    def set_guest_open(self, is_open: bool) -> None:
        """The guest opened or closed the port; input that waited is delivered."""
        self.guest_open = is_open
        self._deliver_now()

    def transmit(self, queue: Virtqueue) -> None:
        """Output of the guest, as far as the host takes it."""
        line = self.line
        assert line is not None
        if self._partial is not None and not self._send(line, queue, *self._partial):
            return
        for chain in queue:
            if not self._send(line, queue, chain, list(chain.readers), 0):
                return

    def _send(
        self, line: CharDevice, queue: Virtqueue, chain: Chain, views: list[memoryview], skip: int
    ) -> bool:
        """Send a chain from byte ``skip`` of its first view on; False when the host has no room."""
        while views and not queue.dead:
            taken = line.write(views[0][skip : skip + PIECE])
            skip += taken
            if skip == len(views[0]):
                del views[0]
                skip = 0
            elif not taken:
                self._partial = (chain, views, skip)
                return False
        self._partial = None
        queue.push(chain, 0)
        return True

    def deliver(self, queue: Virtqueue) -> None:
        """Fill the driver's buffers with input; what does not fit waits for more buffers."""
        waiting = self._input
        if not waiting or not self.guest_open:
            return
        # A chain is popped only when there is something for it.
        while waiting and (chain := queue.pop()) is not None:
            del waiting[: chain.write(waiting)]
            queue.push(chain)
        if not waiting and self.line is not None:
            self.line.resume_input()

    def _deliver_now(self) -> None:
        queue = self._owner.virtio.queue(spec.receiveq(self.number))
        if queue is not None:
            self.deliver(queue)
            queue.notify()

    def _received(self, data: bytes) -> None:
        self._input += data
        self._deliver_now()
        if self._input and self.line is not None:
            self.line.pause_input()

    def flush(self, seconds: float) -> None:
        """Write out what is buffered; what nobody takes in time is lost with a word in the log."""
        line = self.line
        if line is not None and not line.flush(seconds):
            ctx = self._owner.ctx
            ctx.log.warning("%s: the last output was not taken by %s", ctx.name, line.description)

    def close(self) -> None:
        """Give the host device back; idempotent."""
        if self.line is not None:
            self.line.close()

    def status(self) -> Mapping[str, object]:
        """Counters of the host device, and the input that waits for the guest."""
        line = self.line.status() if self.line is not None else {"hostdev": self._label}
        return {**line, "waiting_input": len(self._input)}
