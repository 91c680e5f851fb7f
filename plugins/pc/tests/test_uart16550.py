"""The UART's registers against the 16550A's data sheet."""

from __future__ import annotations

import pytest
from qvm_pc.uart16550 import (
    DLL,
    DLM,
    FCR,
    FCR_CLEAR_RX,
    FCR_CLEAR_TX,
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
    LINE_LIMIT,
    LSR,
    LSR_OVERRUN,
    LSR_READY,
    LSR_TEMT,
    LSR_THRE,
    MCR,
    MCR_LOOP,
    MCR_OUT1,
    MCR_OUT2,
    MCR_RTS,
    MSR,
    RBR,
    SCR,
    THR,
    Uart,
)

# What IIR shows (table of the data sheet, highest priority first), without the FIFO bits.
LINE, DATA, TIMEOUT, EMPTY, MODEM, NONE = 6, 4, 12, 2, 0, 1


@pytest.fixture
def uart() -> Uart:
    """A chip whose guest takes input."""
    uart = Uart()
    uart.write(MCR, MCR_RTS)
    return uart


def cause(uart: Uart) -> int:
    return uart.read(IIR) & 0x0F


def text(uart: Uart) -> bytes:
    got = bytearray()
    while uart.read(LSR) & LSR_READY:
        got.append(uart.read(RBR))
    return bytes(got)


def test_reset_values() -> None:
    uart = Uart()
    assert [uart.read(each) for each in (IER, IIR, LCR, MCR, LSR, SCR)] == [0, 1, 0, 0, 0x60, 0]
    assert uart.read(MSR) & 0x0F == 0
    assert not uart.interrupt


def test_the_divisor_hides_data_and_interrupt_enable_while_dlab_is_set(uart: Uart) -> None:
    uart.write(IER, IER_THRE)
    uart.write(LCR, LCR_DLAB | 3)
    uart.write(DLL, 0x34)
    uart.write(DLM, 0x12)
    assert (uart.read(DLL), uart.read(DLM)) == (0x34, 0x12)
    assert uart.outgoing == b""
    uart.write(LCR, 3)
    assert uart.read(IER) == IER_THRE
    uart.write(LCR, LCR_DLAB)
    assert (uart.read(DLL), uart.read(DLM)) == (0x34, 0x12)


def test_fifos_show_in_iir_and_changing_the_mode_empties_them(uart: Uart) -> None:
    uart.write(FCR, FCR_ENABLE)
    assert uart.read(IIR) & 0xC0 == 0xC0
    uart.write(MCR, MCR_LOOP)
    uart.write(THR, 1)
    uart.write(FCR, 0)
    assert uart.read(IIR) & 0xC0 == 0
    assert text(uart) == b""


@pytest.mark.parametrize(("bits", "level"), list(enumerate((1, 4, 8, 14))))
def test_below_the_trigger_level_it_is_a_time_out_and_at_it_received_data(
    uart: Uart, bits: int, level: int
) -> None:
    uart.write(FCR, FCR_ENABLE | bits << 6)
    uart.write(IER, IER_RECEIVED)
    for count in range(1, FIFO + 1):
        uart.arrive(b"x")
        assert cause(uart) == (DATA if count >= level else TIMEOUT)
    for count in range(FIFO - 1, 0, -1):
        uart.read(RBR)
        assert cause(uart) == (DATA if count >= level else TIMEOUT)
    uart.read(RBR)
    assert cause(uart) == NONE


def test_without_fifos_one_byte_is_received_data_and_the_next_waits(uart: Uart) -> None:
    uart.write(IER, IER_RECEIVED)
    uart.arrive(b"ab")
    assert cause(uart) == DATA
    assert len(uart.incoming) == 1
    assert text(uart) == b"ab"
    assert not uart.interrupt


def test_the_guest_gets_no_input_before_it_asks_for_some() -> None:
    """Else what is typed before the driver is up would be in the FIFO that the driver clears."""
    uart = Uart()
    uart.arrive(b"reboot\n")
    uart.write(FCR, FCR_ENABLE | FCR_CLEAR_RX | FCR_CLEAR_TX)
    uart.read(RBR)
    assert not uart.read(LSR) & LSR_READY
    uart.write(IER, IER_RECEIVED)
    assert text(uart) == b"reboot\n"


def test_a_cleared_receive_fifo_is_filled_by_what_waited_behind_it(uart: Uart) -> None:
    uart.write(FCR, FCR_ENABLE)
    uart.arrive(bytes(range(20)))
    uart.write(FCR, FCR_ENABLE | FCR_CLEAR_RX)
    assert text(uart) == bytes(range(16, 20))


def test_thre_is_raised_by_enabling_it_as_often_as_it_is_enabled(uart: Uart) -> None:
    for _ in range(3):
        uart.write(IER, IER_THRE)
        assert uart.interrupt
        assert cause(uart) == EMPTY
        assert not uart.interrupt, "reading IIR takes it back"
        uart.write(IER, 0)
        assert cause(uart) == NONE


def test_thre_is_not_raised_by_writing_an_enable_that_is_set(uart: Uart) -> None:
    uart.write(IER, IER_THRE)
    assert cause(uart) == EMPTY
    uart.write(IER, IER_THRE | IER_MODEM)
    assert cause(uart) == NONE


def test_thre_comes_again_for_each_byte_that_leaves(uart: Uart) -> None:
    uart.write(IER, IER_THRE)
    cause(uart)
    uart.write(THR, ord("x"))
    assert cause(uart) == EMPTY
    assert uart.read(LSR) & (LSR_THRE | LSR_TEMT) == LSR_THRE | LSR_TEMT


def test_thre_stays_when_iir_shows_something_of_higher_priority(uart: Uart) -> None:
    uart.write(IER, IER_THRE | IER_RECEIVED)
    uart.arrive(b"x")
    assert cause(uart) == DATA
    uart.read(RBR)
    assert cause(uart) == EMPTY


def test_a_full_line_shows_as_a_full_transmitter_until_the_host_takes_some(uart: Uart) -> None:
    uart.write(FCR, FCR_ENABLE)
    uart.write(IER, IER_THRE)
    for _ in range(LINE_LIMIT):
        uart.write(THR, 65)
    assert cause(uart) == EMPTY
    for _ in range(FIFO):
        uart.write(THR, 66)
    assert not uart.read(LSR) & (LSR_THRE | LSR_TEMT)
    assert not uart.interrupt
    assert uart.lost == 0
    uart.write(THR, 67)
    assert uart.lost == 1
    assert bytes(uart.outgoing) == b"A" * LINE_LIMIT + b"B" * FIFO
    uart.write(IER, 0)
    uart.write(IER, IER_THRE)
    assert not uart.interrupt, "enabling raises it for an empty transmitter only"
    uart.depart(FIFO - 1)
    assert not uart.interrupt
    uart.depart(1)
    assert cause(uart) == EMPTY
    assert uart.read(LSR) & LSR_THRE


def test_a_cleared_transmit_fifo_loses_nothing_that_was_on_the_line(uart: Uart) -> None:
    uart.write(FCR, FCR_ENABLE)
    for _ in range(LINE_LIMIT + 3):
        uart.write(THR, 65)
    uart.write(FCR, FCR_ENABLE | FCR_CLEAR_TX)
    assert len(uart.outgoing) == LINE_LIMIT
    assert uart.read(LSR) & LSR_THRE


def test_bits_are_where_the_data_sheet_has_them() -> None:
    """In numbers, for a name could be wrong on both sides."""
    uart = Uart()
    uart.write(4, 0x02)
    uart.write(2, 0x81)
    uart.arrive(b"abc")
    for _ in range(LINE_LIMIT + 3):
        uart.write(0, 65)
    uart.write(2, 0x81)
    assert uart.read(5) == 0x01
    uart.write(2, 0x85)
    assert uart.read(5) == 0x61
    uart.write(2, 0x83)
    assert uart.read(5) == 0x60
    uart.write(3, 0x80)
    uart.write(0, 0x55)
    uart.write(3, 0x00)
    assert uart.read(0) == 0
    uart.write(1, 0x02)
    assert uart.read(2) == 0xC2
    uart.write(4, 0x11)
    assert uart.read(6) == 0x20 | 0x09  # carrier and clear-to-send went
    uart.write(4, 0x14)
    assert uart.read(6) == 0x40 | 0x02
    uart.write(0, 0x42)
    assert uart.read(5) == 0x61
    uart.write(7, 0x99)
    assert uart.read(7) == 0x99


def test_loopback_overrun_with_fifos_loses_the_newest_and_reading_lsr_takes_it_back(uart: Uart) -> None:
    uart.write(FCR, FCR_ENABLE)
    uart.write(IER, IER_LINE)
    uart.write(MCR, MCR_LOOP)
    for byte in range(FIFO + 3):
        uart.write(THR, byte)
    assert cause(uart) == LINE
    assert uart.read(LSR) & LSR_OVERRUN
    assert not uart.read(LSR) & LSR_OVERRUN
    assert not uart.interrupt
    assert text(uart) == bytes(range(FIFO))
    assert uart.outgoing == b""


def test_loopback_overrun_without_fifos_loses_the_oldest(uart: Uart) -> None:
    uart.write(MCR, MCR_LOOP)
    uart.write(THR, 1)
    uart.write(THR, 2)
    assert uart.read(LSR) & LSR_OVERRUN
    assert uart.read(RBR) == 2


def test_input_waits_while_the_port_is_looped(uart: Uart) -> None:
    uart.write(MCR, MCR_LOOP | MCR_RTS)
    uart.arrive(b"x")
    assert not uart.read(LSR) & LSR_READY
    uart.write(MCR, MCR_RTS)
    assert text(uart) == b"x"


def test_loopback_ties_modem_outputs_to_inputs_and_changes_interrupt(uart: Uart) -> None:
    uart.write(IER, IER_MODEM)
    uart.write(MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS)
    assert cause(uart) == MODEM
    # Carrier and clear-to-send stay, data-set-ready goes.
    assert uart.read(MSR) == 0x92
    assert not uart.interrupt
    uart.write(MCR, MCR_LOOP | MCR_OUT1)
    assert uart.read(MSR) == 0x49  # both deltas; a ring that begins is none
    uart.write(MCR, MCR_LOOP)
    assert uart.read(MSR) == 0x04  # a ring that ends is


def test_changes_of_modem_lines_add_up_until_they_are_read(uart: Uart) -> None:
    uart.write(MCR, MCR_LOOP)
    uart.write(MCR, MCR_LOOP | MCR_OUT2)
    uart.write(MCR, MCR_LOOP | MCR_OUT2)
    assert uart.read(MSR) == 0x80 | 0x0B
    assert uart.read(MSR) == 0x80


def test_a_pc_driver_finds_a_working_16550a() -> None:
    """What Linux's 8250 driver asks of a port before it believes in it, in that order."""
    uart = Uart()
    # 1. The enable register has four bits, and the others stay zero.
    uart.write(IER, 0)
    assert uart.read(IER) == 0
    uart.write(IER, 0x0F)
    assert uart.read(IER) == 0x0F
    uart.write(IER, 0)
    # 2. Looped back, OUT2 and RTS come in as carrier and clear-to-send.
    saved = uart.read(MCR)
    uart.write(MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS)
    assert uart.read(MSR) & 0xF0 == 0x90
    uart.write(MCR, saved)
    # 3. FIFOs can be enabled and work: a 16550A, of none of the kinds with more registers.
    uart.write(LCR, 0xBF)
    uart.write(2, 0)
    uart.write(LCR, 0)
    uart.write(FCR, FCR_ENABLE)
    assert uart.read(IIR) >> 6 == 3
    for bank in (LCR_DLAB, 0xBF):
        uart.write(LCR, bank)
        assert uart.read(2) != 0, "no enhanced feature register"
    uart.write(LCR, 0xE0)
    second = uart.read(2)
    uart.write(LCR, 0)
    uart.write(MCR, uart.read(MCR) ^ MCR_LOOP)
    uart.write(LCR, 0xE0)
    assert uart.read(2) & MCR_LOOP == second & MCR_LOOP, "no second bank that mirrors MCR"
    uart.write(LCR, 0)
    uart.write(MCR, uart.read(MCR) ^ MCR_LOOP)
    uart.write(LCR, LCR_DLAB)
    uart.write(FCR, FCR_ENABLE | 1 << 5)
    assert uart.read(IIR) >> 5 == 6, "no 64-byte FIFO"
    uart.write(LCR, 0)
    uart.write(IER, 1 << 6)
    assert uart.read(IER) == 0, "no unit enable"
    # 4. At the start of use: clear everything, nothing is pending.
    uart.write(FCR, FCR_ENABLE | FCR_CLEAR_RX | FCR_CLEAR_TX)
    uart.write(FCR, 0)
    for register in (LSR, RBR, IIR, MSR):
        uart.read(register)
    assert uart.read(LSR) == LSR_THRE | LSR_TEMT
    # 5. Enabling the interrupt of an empty transmitter raises it each time.
    answers = []
    for _ in range(2):
        uart.write(IER, IER_THRE)
        answers.append(uart.read(IIR) & 1)
        uart.write(IER, 0)
    assert answers == [0, 0]
    uart.write(IER, IER_THRE)
    assert uart.read(LSR) & LSR_TEMT
    assert not uart.read(IIR) & 1
    uart.write(IER, 0)
