"""The UART beside a model written from the tables of its data sheet."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from qvm_pc.uart16550 import (
    FCR,
    FCR_CLEAR_RX,
    FCR_ENABLE,
    FIFO,
    IER,
    IER_LINE,
    IER_MODEM,
    IER_RECEIVED,
    IER_THRE,
    IIR,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_TEMT,
    LSR_THRE,
    MCR,
    MCR_LOOP,
    MCR_RTS,
    MSR,
    RBR,
    SCR,
    THR,
    Uart,
)  # fmt: skip

# What IIR shows, highest priority first, without the FIFO bits.
LINE, DATA, TIMEOUT, EMPTY, MODEM, NONE = 6, 4, 12, 2, 0, 1


class Model(RuleBasedStateMachine):
    """The chip beside a model of its tables. The host takes everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.uart = Uart()
        self.fifo: deque[int] = deque()
        self.line: deque[int] = deque()
        self.ier = self.lcr = self.mcr = self.scr = 0
        self.fifos, self.trigger = False, 1
        self.overrun, self.thre = False, True
        self.inputs, self.delta = 0xB0, 0
        self.divisor = [12, 0]
        self.output = bytearray()

    def expected(self) -> int:
        ready = len(self.fifo) >= (self.trigger if self.fifos else 1)
        for enable, pending, number in (
            (IER_LINE, self.overrun, LINE),
            (IER_RECEIVED, ready, DATA),
            (IER_RECEIVED, self.fifo, TIMEOUT),
            (IER_THRE, self.thre, EMPTY),
            (IER_MODEM, self.delta, MODEM),
        ):
            if self.ier & enable and pending:
                return number
        return NONE

    def refill(self) -> None:
        depth = FIFO if self.fifos else 1
        while self.line and len(self.fifo) < depth and not self.mcr & MCR_LOOP:
            if not (self.mcr & MCR_RTS or self.ier & IER_RECEIVED):
                break
            self.fifo.append(self.line.popleft())

    @property
    def dlab(self) -> bool:
        return bool(self.lcr & LCR_DLAB)

    @rule(data=st.binary(max_size=40))
    def input(self, data: bytes) -> None:
        self.uart.arrive(data)
        self.line.extend(data)
        self.refill()

    @rule(byte=st.integers(0, 255))
    def write_data(self, byte: int) -> None:
        self.uart.write(THR, byte)
        if self.dlab:
            self.divisor[0] = byte
            return
        self.thre = True
        if not self.mcr & MCR_LOOP:
            self.output.append(byte)
        elif len(self.fifo) < (FIFO if self.fifos else 1):
            self.fifo.append(byte)
        else:
            self.overrun = True
            if not self.fifos:
                self.fifo = deque([byte])

    @rule()
    def read_data(self) -> None:
        value = self.uart.read(RBR)
        if self.dlab:
            assert value == self.divisor[0]
            return
        assert value == (self.fifo.popleft() if self.fifo else 0)
        self.refill()

    @rule(byte=st.integers(0, 255))
    def write_ier(self, byte: int) -> None:
        self.uart.write(IER, byte)
        if self.dlab:
            self.divisor[1] = byte
            return
        self.thre = self.thre or bool(byte & ~self.ier & IER_THRE)
        self.ier = byte & 0x0F
        self.refill()

    @rule()
    def read_ier(self) -> None:
        assert self.uart.read(IER) == (self.divisor[1] if self.dlab else self.ier)

    @rule()
    def read_iir(self) -> None:
        shown = self.expected()
        assert self.uart.read(IIR) == shown | (0xC0 if self.fifos else 0)
        self.thre = self.thre and shown != EMPTY

    @rule(byte=st.integers(0, 255))
    def write_fcr(self, byte: int) -> None:
        self.uart.write(FCR, byte)
        enable = bool(byte & FCR_ENABLE)
        if enable != self.fifos or byte & (FCR_ENABLE | FCR_CLEAR_RX) == FCR_ENABLE | FCR_CLEAR_RX:
            self.fifo.clear()
        self.fifos, self.trigger = enable, (1, 4, 8, 14)[byte >> 6]
        self.refill()

    @rule(byte=st.sampled_from([0x00, 0x03, 0x80, 0xBF]))
    def write_lcr(self, byte: int) -> None:
        self.uart.write(LCR, byte)
        self.lcr = byte

    @rule(byte=st.integers(0, 255))
    def write_mcr(self, byte: int) -> None:
        self.uart.write(MCR, byte)
        self.mcr = byte & 0x1F
        inputs = 0xB0
        if byte & MCR_LOOP:
            dtr, rts, out1, out2 = (byte >> bit & 1 for bit in range(4))
            inputs = rts << 4 | dtr << 5 | out1 << 6 | out2 << 7
        changed = inputs ^ self.inputs
        self.delta |= changed >> 4 & 0b1011 | (self.inputs & ~inputs & 0x40) >> 4
        self.inputs = inputs
        self.refill()

    @rule()
    def read_lsr(self) -> None:
        ready, over = bool(self.fifo), self.overrun << 1
        assert self.uart.read(LSR) == ready | over | LSR_THRE | LSR_TEMT
        self.overrun = False

    @rule()
    def read_msr(self) -> None:
        assert self.uart.read(MSR) == self.inputs | self.delta
        self.delta = 0

    @rule(byte=st.integers(0, 255))
    def scratch(self, byte: int) -> None:
        self.uart.write(SCR, byte)
        assert self.uart.read(SCR) == byte

    @rule(register=st.sampled_from([LSR, MSR]), byte=st.integers(0, 255))
    def write_read_only(self, register: int, byte: int) -> None:
        self.uart.write(register, byte)

    @invariant()
    def interrupt_and_output_agree(self) -> None:
        assert self.uart.interrupt == (self.expected() != NONE)
        assert self.uart.outgoing == self.output
        assert list(self.uart.incoming) == list(self.line)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
