"""pl011 against DDI 0183: transmit, receive, interrupts, flow control."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_primecell.pl011 import (
    CR,
    CR_LBE,
    CR_UARTEN,
    DR,
    FR,
    FR_RXFE,
    FR_RXFF,
    FR_TXFE,
    FR_TXFF,
    ICR,
    IMSC,
    INT_RT,
    INT_RX,
    INT_TX,
    LCR_FEN,
    LCR_H,
    MIS,
    RX_FIFO,
    TX_LIMIT,
    Pl011,
)

from qvmcore.errors import ConfigError, HostError
from qvmcore.testing.fakes import Plugged, plug


def text(uart: Plugged[Pl011]) -> bytes:
    """What the guest's driver reads until the FIFO is empty."""
    got = bytearray()
    while not uart.read(FR) & FR_RXFE:
        got.append(uart.read(DR) & 0xFF)
    return bytes(got)


def test_identification_registers() -> None:
    with plug(Pl011) as uart:
        assert [uart.read(0xFE0 + 4 * i) for i in range(8)] == [0x11, 0x10, 0x34, 0, 0x0D, 0xF0, 0x05, 0xB1]


def test_output_reaches_the_host_and_the_transmit_interrupt_follows(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with plug(Pl011, hostdev=f">{target}") as uart:
        uart.write(IMSC, INT_TX)
        for byte in b"hello":
            uart.write(DR, byte, 1)
        uart.settle()
        assert uart.irq.level
        uart.write(ICR, INT_TX)
        assert not uart.irq.level
        assert uart.read(FR) & FR_TXFE
        assert target.read_bytes() == b"hello"


def test_the_last_words_are_written_when_the_vm_ends_at_once(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with plug(Pl011, hostdev=f">{target}") as uart:
        for byte in b"Kernel panic":
            uart.write(DR, byte, 1)
    assert target.read_bytes() == b"Kernel panic"


def test_input_interrupts_and_is_read_in_order(tmp_path: Path) -> None:
    fifo = tmp_path / "in"
    os.mkfifo(fifo)
    with plug(Pl011, hostdev=f"<{fifo}") as uart:
        uart.write(LCR_H, LCR_FEN)
        uart.write(IMSC, INT_RX | INT_RT)
        with fifo.open("wb", buffering=0) as writer:
            writer.write(b"ls\n")
            assert uart.irq.wait(1)
            assert uart.read(MIS) & INT_RT
            assert text(uart) == b"ls\n"
            assert not uart.irq.level


@pytest.mark.parametrize("size", [RX_FIFO - 1, RX_FIFO, RX_FIFO + 1, 5000])
def test_more_input_than_the_fifo_holds_waits_and_nothing_is_lost(tmp_path: Path, size: int) -> None:
    fifo = tmp_path / "in"
    os.mkfifo(fifo)
    data = bytes(i % 251 for i in range(size))
    with plug(Pl011, hostdev=f"<{fifo}") as uart:
        uart.write(LCR_H, LCR_FEN)
        uart.write(IMSC, INT_RX | INT_RT)
        with fifo.open("wb", buffering=0) as writer:
            writer.write(data)
            got = b""
            for _ in range(2000):
                uart.settle()
                got += text(uart)
                if len(got) >= size:
                    break
        assert got == data


def test_a_full_receive_fifo_shows_in_the_flags() -> None:
    with plug(Pl011) as uart:
        uart.write(CR, CR_UARTEN | CR_LBE)
        uart.write(DR, ord("x"))
        assert uart.read(FR) & FR_RXFF  # FIFOs off: one byte is full
        uart.write(LCR_H, LCR_FEN)
        assert not uart.read(FR) & FR_RXFF
        assert text(uart) == b"x"


def test_a_host_that_takes_nothing_shows_as_a_full_transmit_fifo(tmp_path: Path) -> None:
    with plug(Pl011) as uart:
        device = uart.vdev._device
        assert device is not None
        device.write = lambda data: 0  # type: ignore[method-assign]
        for _ in range(TX_LIMIT + 10):
            uart.vdev.mmio_write(0, DR, 1, 65)
        uart.settle()
        assert uart.read(FR) & FR_TXFF
        assert uart.vdev.sent == TX_LIMIT


def test_loopback_loses_what_the_fifo_cannot_hold() -> None:
    """Nobody reads it but the guest: a FIFO without a bound would take the host's memory."""
    with plug(Pl011, hostdev="null") as uart:
        uart.write(LCR_H, LCR_FEN)
        uart.write(CR, CR_UARTEN | CR_LBE)
        for _ in range(10 * RX_FIFO):
            uart.write(DR, 65)
        assert text(uart) == b"A" * RX_FIFO


def test_a_narrow_read_of_a_wide_register_is_cut() -> None:
    """CR has bits above the lowest byte; a value that does not fit would be a fault of the device."""
    with plug(Pl011, hostdev="null") as uart:
        uart.write(CR, 0x301)
        assert (uart.read(CR, 1), uart.read(CR, 2)) == (0x01, 0x301)
        assert uart.ctx.faults == []


def test_a_malformed_hostdev_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="hostdev"):
        plug(Pl011, hostdev="unix:")


def test_an_absent_hostdev_is_a_host_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="absent"):
        plug(Pl011, hostdev=f"<{tmp_path / 'absent'}")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)), max_size=40
    )
)
def test_any_register_traffic_is_harmless(accesses: list[tuple[int, int, int]]) -> None:
    with plug(Pl011) as uart:
        for offset, size, value in accesses:
            uart.write(offset, value, size)
            assert 0 <= uart.read(offset, size) < 1 << (8 * size)
        assert uart.ctx.faults == []
