"""The registers and FIFOs of a 16550A UART, without a host device and without an interrupt line.

The line is as fast as the host: a character that is sent is on the line at once, and the four
character times after which the receiver reports a few waiting bytes (the time-out interrupt) are over
at once. Up to ``LINE_LIMIT`` bytes may be on the line; beyond that the transmitter is not empty, and its
FIFO can fill. Divisor, word length and parity are remembered and change nothing.

The other end respects hardware flow control: it sends while the guest holds RTS, or has the receive
interrupt enabled. So what a user types, or a pipe holds, before the guest's driver is up does not end
in the FIFO that the driver clears first of all.
"""

from __future__ import annotations

from collections import deque

# Registers; the first two are the divisor's bytes while LCR_DLAB is set.
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

IER_RECEIVED, IER_THRE, IER_LINE, IER_MODEM = 1 << 0, 1 << 1, 1 << 2, 1 << 3
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RECEIVED, IIR_LINE, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 1 << 0, 1 << 1, 1 << 2
LCR_DLAB = 1 << 7
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
LSR_READY, LSR_OVERRUN, LSR_THRE, LSR_TEMT = 1 << 0, 1 << 1, 1 << 5, 1 << 6
MSR_DCTS, MSR_DDSR, MSR_TERI, MSR_DDCD = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 4, 1 << 5, 1 << 6, 1 << 7

FIFO = 16
TRIGGERS = (1, 4, 8, 14)
#: Bytes that may be on the line, on their way to a slow host.
LINE_LIMIT = 64 * 1024
#: What is behind the port is always there and ready.
_PEER = MSR_CTS | MSR_DSR | MSR_DCD


class Uart:
    """The chip. Not thread-safe; nothing here blocks or raises."""

    def __init__(self) -> None:
        #: Bytes sent and not taken by the host yet: those on the line, then those in the FIFO.
        self.outgoing = bytearray()
        #: Bytes the host sent that are not in the FIFO yet.
        self.incoming: deque[int] = deque()
        self.sent = self.lost = 0
        self._divisor = 12
        self.reset()

    def reset(self) -> None:
        """The RESET pin: registers and FIFOs; what is on the line goes on its way."""
        self._fifo: deque[int] = deque()
        self._ier = self._lcr = self._mcr = self._scr = 0
        self._fifos = False
        self._trigger = 1
        self._overrun = False
        self._modem, self._delta = _PEER, 0
        del self.outgoing[LINE_LIMIT:]
        #: Whether the guest has yet to be told that the transmitter is empty.
        self._thre = True

    @property
    def interrupt(self) -> bool:
        """The level of INTR."""
        return self._cause() != IIR_NONE

    # -- the line ------------------------------------------------------------------------------

    def arrive(self, data: bytes) -> None:
        """Bytes from the other end; they wait until there is room for them."""
        self.incoming.extend(data)
        self._fill()

    def depart(self, count: int) -> None:
        """The other end took the first ``count`` bytes of ``outgoing``."""
        was_full = not self._empty()
        del self.outgoing[:count]
        if was_full and self._empty():
            self._thre = True

    # -- the bus -------------------------------------------------------------------------------

    def read(self, offset: int) -> int:
        """The register at ``offset``, 0 to 7, with what reading it does."""
        if offset <= DLM and self._lcr & LCR_DLAB:
            return self._divisor >> 8 * offset & 0xFF
        if offset == RBR:
            return self._receive()
        if offset == IIR:
            cause = self._cause()
            if cause == IIR_THRE:
                self._thre = False
            return cause | (IIR_FIFOS if self._fifos else 0)
        if offset == LSR:
            return self._line_status()
        if offset == MSR:
            value, self._delta = self._modem | self._delta, 0
            return value
        return {IER: self._ier, LCR: self._lcr, MCR: self._mcr, SCR: self._scr}[offset]

    def write(self, offset: int, value: int) -> None:
        """Store a byte at ``offset``, 0 to 7; LSR and MSR cannot be written."""
        if offset <= DLM and self._lcr & LCR_DLAB:
            shift = 8 * offset
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
        elif offset == THR:
            self._transmit(value)
        elif offset == IER:
            # Enabling the interrupt of an empty transmitter raises it, however often that is done.
            if value & IER_THRE and not self._ier & IER_THRE and self._empty():
                self._thre = True
            self._ier = value & 0x0F
        elif offset == FCR:
            self._control_fifos(value)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & 0x1F
            self._set_modem(_looped(value) if value & MCR_LOOP else _PEER)
        elif offset == SCR:
            self._scr = value
        self._fill()

    # -- inside --------------------------------------------------------------------------------

    @property
    def _depth(self) -> int:
        return FIFO if self._fifos else 1

    def _cause(self) -> int:
        """What IIR shows: of the enabled causes, the one of the highest priority."""
        if self._ier & IER_LINE and self._overrun:
            return IIR_LINE
        if self._ier & IER_RECEIVED and self._fifo:
            reached = not self._fifos or len(self._fifo) >= self._trigger
            return IIR_RECEIVED if reached else IIR_TIMEOUT
        if self._ier & IER_THRE and self._thre:
            return IIR_THRE
        if self._ier & IER_MODEM and self._delta:
            return IIR_MODEM
        return IIR_NONE

    def _empty(self) -> bool:
        """Whether the transmit FIFO is empty: all that was sent is on the line."""
        return len(self.outgoing) <= LINE_LIMIT

    def _transmit(self, byte: int) -> None:
        self._thre = False
        if self._mcr & MCR_LOOP:
            if len(self._fifo) < self._depth:
                self._fifo.append(byte)
            else:
                self._overflow(byte)
        elif len(self.outgoing) < LINE_LIMIT + self._depth:
            self.outgoing.append(byte)
            self.sent += 1
        else:
            self.lost += 1
        if self._empty():
            self._thre = True

    def _overflow(self, byte: int) -> None:
        """A byte more than fits: without FIFO it replaces the unread one, with one it is lost."""
        self._overrun = True
        if not self._fifos:
            self._fifo[0] = byte

    def _receive(self) -> int:
        byte = self._fifo.popleft() if self._fifo else 0
        self._fill()
        return byte

    def _fill(self) -> None:
        """Take from the line what the FIFO has room for; never more, so that nothing is lost."""
        if self._mcr & MCR_LOOP or not (self._mcr & MCR_RTS or self._ier & IER_RECEIVED):
            return
        while self.incoming and len(self._fifo) < self._depth:
            self._fifo.append(self.incoming.popleft())

    def _line_status(self) -> int:
        value = LSR_READY if self._fifo else 0
        value |= LSR_OVERRUN if self._overrun else 0
        value |= LSR_THRE | LSR_TEMT if self._empty() else 0
        self._overrun = False
        return value

    def _control_fifos(self, value: int) -> None:
        enable = bool(value & FCR_ENABLE)
        changed = enable is not self._fifos
        self._fifos = enable
        # The other bits count only together with the first one.
        self._trigger = TRIGGERS[value >> 6 & 3] if enable else 1
        if changed or (enable and value & FCR_CLEAR_RX):
            self._fifo.clear()
        if (changed or (enable and value & FCR_CLEAR_TX)) and not self._empty():
            del self.outgoing[LINE_LIMIT:]
            self._thre = True

    def _set_modem(self, lines: int) -> None:
        changed = lines ^ self._modem
        self._delta |= changed >> 4 & (MSR_DCTS | MSR_DDSR | MSR_DDCD)
        # Of the ring indicator only its end counts.
        self._delta |= MSR_TERI if changed & ~lines & MSR_RI else 0
        self._modem = lines


def _looped(mcr: int) -> int:
    """The modem inputs when MCR's outputs are tied to them."""
    pairs = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
    return sum(line for output, line in pairs if mcr & output)
