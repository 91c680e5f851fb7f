"""vdev ``ser8250``: a PC's serial port, with a 16550A (see :mod:`qvm_pc.uart16550`).

Output is collected and handed to the host device on the worker thread, so the guest never waits for
the host. Input is taken from the host only while the guest has room for it. The port lies in the I/O
space by default; ``loc = "mem:..."`` puts the same eight byte-wide registers into memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from qvm_chardev import CharDevice, EscapeActions, open_chardev, parse_spec

from qvm_pc.uart16550 import Uart
from qvmcore.api import GuestEnd, Phase, Trigger, Vdev, VdevContext, Window


class Ser8250Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the vdev."""

    hostdev: Annotated[
        str,
        msgspec.Meta(
            description="what is behind the line: terminal, stdio, null, pty[:LINK], unix:PATH, "
            "file:PATH, <PATH (input), >PATH (output), >>PATH (append), >|COMMAND"
        ),
    ] = "null"

    def __post_init__(self) -> None:
        parse_spec(self.hostdev)


class Ser8250(Vdev):
    """The port. Serial by the framework: registers and worker never run at the same time."""

    vdev_type = "ser8250"
    summary = "serial port (16550A UART)"
    Options = Ser8250Options
    windows = (Window(8, access=frozenset({1})),)
    irqs = 1
    trigger = Trigger.LEVEL
    space = "io"
    acpi_hid = "PNP0501"

    def __init__(self, ctx: VdevContext, options: Ser8250Options) -> None:
        super().__init__(ctx, options)
        self._device: CharDevice | None = None
        self._uart = Uart()
        self._level = False
        self._flushing = False
        self._paused = False
        self.received = 0

    @classmethod
    def claims(cls, options: Ser8250Options) -> tuple[str, ...]:
        """The terminal, when the line is on it."""
        return parse_spec(options.hostdev).claims

    def on_reset(self) -> None:
        """As the RESET pin does; what is on its way stays so."""
        self._uart.reset()
        self._settle()

    def on_configured(self) -> None:
        """Open the host device."""
        ctx = self.ctx
        self._device = open_chardev(
            self.options.hostdev,
            worker=ctx.worker,
            on_input=self._on_input,
            on_writable=self._flush,
            log=ctx.log,
            name=ctx.name,
            escape=EscapeActions.of(ctx),
            base=ctx.base_dir,
        )
        ctx.on_terminate(self._drain, phase=Phase.FLUSH)

    def on_terminate(self, end: GuestEnd) -> None:
        """Close the host device, which restores a terminal."""
        if self._device is not None:
            self._device.close()

    def status(self) -> Mapping[str, object]:
        """Bytes in both directions, those on their way, and the host device's own counters."""
        host = dict(self._device.status()) if self._device is not None else {}
        uart = self._uart
        return {
            "sent": uart.sent, "received": self.received, "lost": uart.lost,
            "waiting": len(uart.outgoing), "host": host,
        }  # fmt: skip

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """A register."""
        value = self._uart.read(offset)
        self._settle()
        return value

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """A register."""
        self._uart.write(offset, value)
        self._settle()

    def _settle(self) -> None:
        """Let the outside follow the chip: the interrupt line, the output, the wish for input."""
        uart = self._uart
        if uart.interrupt is not self._level:
            self._level = not self._level
            self.ctx.irq().set(self._level)
        if self._device is None:
            return
        if uart.outgoing and not self._flushing:
            self._flushing = True
            self.ctx.worker.call(self._flush)
        # What one read of the host brought beyond the FIFO waits in ours; then the host waits.
        if bool(uart.incoming) is not self._paused:
            self._paused = not self._paused
            if self._paused:
                self._device.pause_input()
            else:
                self._device.resume_input()

    def _on_input(self, data: bytes) -> None:
        """Worker: bytes from the host."""
        self.received += len(data)
        self._uart.arrive(data)
        self._settle()

    def _flush(self) -> None:
        """Worker: hand on what waits; the host device calls again when it has room."""
        if self._device is not None and self._uart.outgoing:
            taken = self._device.write(self._uart.outgoing)
            self._uart.depart(taken)
        # A short count promises another call, so no further one is asked for until then.
        self._flushing = bool(self._uart.outgoing)
        self._settle()

    def _drain(self, end: GuestEnd) -> None:
        """End, worker stopped: the last words of a guest are often the reason of its end."""
        if self._device is not None:
            self._device.write(self._uart.outgoing)
            self._device.flush(0.5)
