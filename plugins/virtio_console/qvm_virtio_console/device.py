"""The virtio console device with one port (virtio 1.4, 5.3): glue between queues and a hostdev."""

from __future__ import annotations

from collections.abc import Mapping

from qvm_chardev import CharDevice, EscapeActions, open_chardev, parse_spec

from qvm_virtio_console import spec
from qvm_virtio_console.options import ConsoleOptions
from qvmcore.api import Chain, GuestEnd, Phase, VdevContext, VirtioVdev, Virtqueue

#: Bytes handed to the host device at a time, between two looks whether the driver reset the device.
PIECE = 64 * 1024
#: Seconds the end of a VM waits for a slow receiver to take the last output.
FLUSH_SECONDS = 0.5


class VirtioConsole(VirtioVdev):
    """A console. Output that the host does not take holds the guest back; see qvm-chardev for how long."""

    vdev_type = "virtio-console"
    summary = "a serial console on a terminal, file, pseudo-terminal or socket"
    Options = ConsoleOptions
    device_id = spec.DEVICE_ID
    queue_sizes = (128, 128)

    def __init__(self, ctx: VdevContext, options: ConsoleOptions) -> None:
        super().__init__(ctx, options)
        self._line: CharDevice | None = None
        self._features = spec.F_EMERG_WRITE
        self._size = (0, 0)
        self._input = bytearray()
        # A transmitted chain that the host took only in part: it, its views, and the bytes taken.
        self._partial: tuple[Chain, list[memoryview], int] | None = None
        self._emergency = 0
        self._announce_size = False

    @classmethod
    def claims(cls, options: ConsoleOptions) -> tuple[str, ...]:
        """The terminal, when the console is on it."""
        return parse_spec(options.hostdev).claims

    def on_configured(self) -> None:
        """Open the host device; a terminal is raw from here on, until on_terminate."""
        ctx = self.ctx
        escape = None
        if self.options.escape == "ctrl-a":
            escape = EscapeActions(
                quit=lambda: ctx.request_shutdown("the escape key cut the power", code=3),
                power_button=ctx.press_power_button,
            )
        line = self._line = open_chardev(
            self.options.hostdev,
            worker=ctx.worker,
            on_input=self._received,
            on_writable=lambda: self.virtio.kick(spec.TRANSMITQ),
            on_resize=self._resized,
            log=ctx.log,
            name=ctx.name,
            escape=escape,
            base=ctx.base_dir,
        )
        ctx.on_terminate(lambda _end: self._flush(line), phase=Phase.FLUSH, deadline=FLUSH_SECONDS + 1.0)
        size = line.size()
        if size is not None:
            self._size = size
            self._features |= spec.F_SIZE

    def device_features(self) -> int:
        """5.3.3: SIZE with a terminal only, EMERG_WRITE always."""
        return self._features

    def config_space(self) -> bytes:
        """struct virtio_console_config (5.3.4); one port."""
        columns, rows = self._size
        return spec.CONFIG.pack(columns, rows, 1, 0)

    def config_write(self, offset: int, data: bytes) -> None:
        """Emergency write (5.3.4): one character, needs no queue and no negotiation."""
        if offset == spec.CONFIG_EMERG_WR_OFFSET and self._line is not None:
            self._emergency += 1
            self._line.write(data[:1])

    def on_activate(self, features: int) -> None:
        """Linux without MULTIPORT reads the size only after a configuration change (see _transmit)."""
        self._announce_size = bool(features & spec.F_SIZE)

    def on_deactivate(self) -> None:
        """The rest of a chain is the old driver's; it is not sent."""
        self._partial = None

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        """Move bytes in the direction of the queue, as far as both sides allow."""
        if index == spec.RECEIVEQ:
            self._deliver(queue)
        else:
            self._transmit(queue)

    def _transmit(self, queue: Virtqueue) -> None:
        line = self._line
        assert line is not None
        if self._announce_size and queue.pending:
            # Not before the first output: only then has Linux made the port the size belongs to.
            self._announce_size = False
            self.virtio.config_changed(always=True)
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

    def _received(self, data: bytes) -> None:
        """Input from the host (worker thread)."""
        self._input += data
        queue = self.virtio.queue(spec.RECEIVEQ)
        if queue is not None:
            self._deliver(queue)
            queue.notify()
        if self._input and self._line is not None:
            self._line.pause_input()

    def _deliver(self, queue: Virtqueue) -> None:
        """Fill the driver's buffers with input; what does not fit waits for more buffers."""
        waiting = self._input
        if not waiting:
            return
        # A chain is popped only when there is something for it.
        while waiting and (chain := queue.pop()) is not None:
            del waiting[: chain.write(waiting)]
            queue.push(chain)
        if not waiting and self._line is not None:
            self._line.resume_input()

    def _resized(self) -> None:
        size = self._line.size() if self._line is not None else None
        if size is not None:
            self._size = size
            self.virtio.config_changed()

    def _flush(self, line: CharDevice) -> None:
        if not line.flush(FLUSH_SECONDS):
            self.ctx.log.warning("%s: the last output was not taken by %s", self.ctx.name, line.description)

    def on_terminate(self, end: GuestEnd) -> None:
        """Give the host device back; the terminal is as it was."""
        line = self._line
        if line is not None:
            line.close()

    def status(self) -> Mapping[str, object]:
        """Counters of the host device, beside those of the queues."""
        line = self._line.status() if self._line is not None else {"hostdev": self.options.hostdev}
        return {**super().status(), **line, "waiting_input": len(self._input), "emergency": self._emergency}
