"""vdev ``pl011``: ARM PrimeCell UART (DDI 0183, r1p5 with 32-byte FIFOs).

Output is collected and handed to the host device on the worker thread, so the guest never waits
for the host; when more than ``TX_LIMIT`` bytes wait, the transmit FIFO shows full. Input is taken
from the host only while the receive FIFO has room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Annotated

import msgspec
from qvm_chardev import CharDevice, EscapeActions, open_chardev, parse_spec

from qvm_primecell.identity import identity
from qvmcore.api import FdtNode, GuestEnd, Phase, Trigger, Vdev, VdevContext, Window

# Registers, offsets in bytes.
DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR = (
    0x00, 0x04, 0x18, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34, 0x38, 0x3C, 0x40, 0x44, 0x48,
)  # fmt: skip
PERIPHERAL = (0x11, 0x10, 0x34, 0x00)
FR_RXFE, FR_TXFF, FR_RXFF, FR_TXFE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
INT_RX, INT_TX, INT_RT = 1 << 4, 1 << 5, 1 << 6
INT_ALL = 0x7FF
LCR_FEN = 1 << 4
CR_UARTEN, CR_LBE, CR_TXE, CR_RXE = 1 << 0, 1 << 7, 1 << 8, 1 << 9
RX_FIFO = 32
#: Bytes that may wait for a slow host before the guest sees a full transmit FIFO.
TX_LIMIT = 64 * 1024
#: Receive trigger levels of IFLS[5:3], in bytes of a 32-byte FIFO.
RX_TRIGGER = (4, 8, 16, 24, 28, 28, 28, 28)


class Pl011Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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


class Pl011(Vdev):
    """The UART. Serial by the framework: registers and worker never run at the same time."""

    vdev_type = "pl011"
    summary = "ARM PrimeCell UART"
    Options = Pl011Options
    windows = (Window(0x1000, access=frozenset({1, 2, 4})),)
    irqs = 1
    trigger = Trigger.LEVEL
    fdt_compatible = ("arm,pl011", "arm,primecell")

    def __init__(self, ctx: VdevContext, options: Pl011Options) -> None:
        super().__init__(ctx, options)
        self._device: CharDevice | None = None
        self._rx: deque[int] = deque()
        self._tx = bytearray()
        self._flushing = False
        self._paused = False
        self.sent = self.received = 0
        self.on_reset()

    @classmethod
    def claims(cls, options: Pl011Options) -> tuple[str, ...]:
        """The terminal, when the line is on it."""
        return parse_spec(options.hostdev).claims

    def on_reset(self) -> None:
        """Reset values of DDI 0183, table 3-1."""
        self._rx.clear()
        self._raw = self._mask = self._lcr = self._ibrd = self._fbrd = self._ilpr = self._dmacr = 0
        self._cr, self._ifls = CR_TXE | CR_RXE, 0x12

    def describe_fdt(self, node: FdtNode) -> None:
        """Both clocks of the binding are the board's fixed one."""
        clock = node.reference("/apb-pclk")
        node.set_cells("clocks", clock, clock)
        node.set_string("clock-names", "uartclk", "apb_pclk")

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
        """Bytes in both directions, and the host device's own counters."""
        host = dict(self._device.status()) if self._device is not None else {}
        return {"sent": self.sent, "received": self.received, "waiting": len(self._tx), "host": host}

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """A register, cut to the access; reserved ones read as zero."""
        return self._register(offset) & (1 << 8 * size) - 1

    def _register(self, offset: int) -> int:
        if offset == DR:
            return self._receive()
        if offset == FR:
            return self._flags()
        values = {
            RSR: 0, ILPR: self._ilpr, IBRD: self._ibrd, FBRD: self._fbrd, LCR_H: self._lcr, CR: self._cr,
            IFLS: self._ifls, IMSC: self._mask, RIS: self._raw, MIS: self._raw & self._mask,
            DMACR: self._dmacr,
        }  # fmt: skip
        if offset in values:
            return values[offset]
        return identity(offset, PERIPHERAL) or 0

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """A register; writes to reserved and read-only ones are ignored."""
        if offset == DR:
            self._send(value & 0xFF)
        elif offset == IMSC:
            self._mask = value & INT_ALL
        elif offset == ICR:
            self._raw &= ~value
        elif offset == CR:
            self._cr = value & 0xFFFF
        elif offset == LCR_H:
            self._lcr = value & 0xFF
            self._resume()
        elif offset == IFLS:
            self._ifls = value & 0x3F
        elif offset == IBRD:
            self._ibrd = value & 0xFFFF
        elif offset == FBRD:
            self._fbrd = value & 0x3F
        elif offset == ILPR:
            self._ilpr = value & 0xFF
        elif offset == DMACR:
            self._dmacr = value & 0x7
        self._update()

    # -- transmit ------------------------------------------------------------------------------

    def _send(self, byte: int) -> None:
        if self._cr & CR_LBE:
            # Nobody but the guest empties the FIFO then: what does not fit is lost, as on a real one.
            if len(self._rx) < self._depth():
                self._deliver(bytes([byte]))
            return
        if len(self._tx) < TX_LIMIT:
            self._tx.append(byte)
            self.sent += 1
            if not self._flushing and self._device is not None:
                self._flushing = True
                self.ctx.worker.call(self._flush)
        self._raw |= INT_TX

    def _flush(self) -> None:
        """Worker: hand on what waits; the host device calls again when it has room."""
        self._flushing = False
        if self._device is not None and self._tx:
            taken = self._device.write(self._tx)
            del self._tx[:taken]
            # A short count promises another call, so no further one is asked for until then.
            self._flushing = bool(self._tx)
            self._raw |= INT_TX
            self._update()

    def _drain(self, end: GuestEnd) -> None:
        """End, worker stopped: the last words of a guest are often the reason of its end."""
        if self._device is not None:
            self._device.write(self._tx)
            self._device.flush(0.5)

    # -- receive -------------------------------------------------------------------------------

    def _depth(self) -> int:
        return RX_FIFO if self._lcr & LCR_FEN else 1

    def _on_input(self, data: bytes) -> None:
        """Worker: bytes from the host."""
        self.received += len(data)
        self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        self._rx.extend(data)
        if self._device is not None and not self._paused and len(self._rx) >= self._depth():
            # What one read of the host brought beyond the FIFO waits in ours; then the host waits.
            self._paused = True
            self._device.pause_input()
        # The receive time-out is raised at once: no more of this burst is on its way.
        self._raw |= INT_RT
        if len(self._rx) >= (RX_TRIGGER[self._ifls >> 3 & 7] if self._lcr & LCR_FEN else 1):
            self._raw |= INT_RX
        self._update()

    def _receive(self) -> int:
        if not self._rx:
            return 0
        value = self._rx.popleft()
        if not self._rx:
            self._raw &= ~(INT_RX | INT_RT)
        elif len(self._rx) < RX_TRIGGER[self._ifls >> 3 & 7]:
            self._raw &= ~INT_RX
        self._resume()
        self._update()
        return value

    def _resume(self) -> None:
        if self._paused and self._device is not None and len(self._rx) < self._depth():
            self._paused = False
            self._device.resume_input()

    def _flags(self) -> int:
        flags = FR_TXFE if not self._tx else 0
        if not self._rx:
            flags |= FR_RXFE
        elif len(self._rx) >= self._depth():
            flags |= FR_RXFF
        return flags | (FR_TXFF if len(self._tx) >= TX_LIMIT else 0)

    def _update(self) -> None:
        self.ctx.irq().set(bool(self._raw & self._mask))
