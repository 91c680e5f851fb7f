"""ser8250 with a host behind it: nothing blocks the guest, nothing is lost."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_chardev.files import Null
from qvm_chardev.testing import wait_for
from qvm_pc.ser8250 import Ser8250
from qvm_pc.uart16550 import (
    FCR,
    FCR_ENABLE,
    FIFO,
    IER,
    IER_RECEIVED,
    IER_THRE,
    IIR,
    LINE_LIMIT,
    LSR,
    LSR_READY,
    LSR_THRE,
    MCR,
    MCR_LOOP,
    RBR,
    THR,
)

from qvmcore.api import ConfigError, HostError
from qvmcore.testing.fakes import Plugged, plug


def text(port: Plugged[Ser8250]) -> bytes:
    """What the guest's driver reads until the FIFO is empty."""
    got = bytearray()
    while port.read(LSR, 1) & LSR_READY:
        got.append(port.read(RBR, 1))
    return bytes(got)


def say(port: Plugged[Ser8250], words: bytes) -> None:
    for byte in words:
        port.write(THR, byte, 1)


def test_output_reaches_the_host_and_the_interrupt_line_is_a_level(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with plug(Ser8250, hostdev=f">{target}") as port:
        port.write(IER, IER_THRE, 1)
        assert port.irq.level
        port.read(IIR, 1)
        assert not port.irq.level
        say(port, b"hello")
        assert port.irq.level
        port.settle()
        assert target.read_bytes() == b"hello"
        assert port.vdev.status()["sent"] == 5
        assert port.vdev.status()["waiting"] == 0


def test_the_last_words_are_written_when_the_vm_ends_at_once(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with plug(Ser8250, hostdev=f">{target}") as port:
        say(port, b"Kernel panic")
    assert target.read_bytes() == b"Kernel panic"


def test_what_the_worker_had_no_time_for_is_written_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with plug(Ser8250, hostdev=f">{target}") as port:
        port.vdev._flushing = True  # as if it had been asked for, and not come yet
        say(port, b"late")
        port.settle()
        assert target.read_bytes() == b""
    assert target.read_bytes() == b"late"


def test_many_bytes_ask_the_worker_once(tmp_path: Path) -> None:
    with plug(Ser8250, hostdev=f">{tmp_path / 'out'}") as port:
        with port.ctx.serial:  # the worker waits for this
            say(port, b"x" * 100)
            assert len(port.ctx.worker._calls) <= 1
        port.settle()
        assert (tmp_path / "out").read_bytes() == b"x" * 100


def test_the_escape_key_cuts_the_power_or_presses_the_button(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("qvm_pc.ser8250.open_chardev", lambda spec, **rest: given.update(rest) or Null())
    with plug(Ser8250) as port:
        given["escape"].quit()
        given["escape"].power_button()
        assert [code for _, code in port.ctx.shutdowns] == [3]
        assert port.ctx.button_presses == 1


def test_input_interrupts_and_is_read_in_order(tmp_path: Path) -> None:
    fifo = tmp_path / "in"
    os.mkfifo(fifo)
    with plug(Ser8250, hostdev=f"<{fifo}") as port:
        port.write(FCR, FCR_ENABLE, 1)
        port.write(IER, IER_RECEIVED, 1)
        with fifo.open("wb", buffering=0) as writer:
            writer.write(b"ls\n")
            assert port.irq.wait(1)
            assert text(port) == b"ls\n"
            assert not port.irq.level


@pytest.mark.parametrize("fifos", [FCR_ENABLE, 0])
@pytest.mark.parametrize("size", [FIFO - 1, FIFO, FIFO + 1, 5000])
def test_more_input_than_the_fifo_holds_waits_and_nothing_is_lost(
    tmp_path: Path, size: int, fifos: int
) -> None:
    fifo = tmp_path / "in"
    os.mkfifo(fifo)
    data = bytes(i % 251 for i in range(size))
    with plug(Ser8250, hostdev=f"<{fifo}") as port:
        port.write(FCR, fifos, 1)
        port.write(IER, IER_RECEIVED, 1)
        got = b""
        with fifo.open("wb", buffering=0) as writer:
            writer.write(data)
            for _ in range(2000):
                port.settle()
                got += text(port)
                if len(got) >= size:
                    break
        assert got == data


def test_input_is_left_with_the_host_while_the_guest_does_not_read(tmp_path: Path) -> None:
    fifo = tmp_path / "in"
    os.mkfifo(fifo)
    with plug(Ser8250, hostdev=f"<{fifo}") as port:
        port.write(IER, IER_RECEIVED, 1)
        writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        written, full = 0, False
        while not full and written < 1 << 24:
            try:
                written += os.write(writer, bytes(4096))
            except BlockingIOError:
                full = True
            port.settle()
        os.close(writer)
        assert full, "the pipe never filled: the port took what nobody reads"
        assert port.vdev.received < written


def test_a_host_that_takes_nothing_shows_as_a_full_transmitter(tmp_path: Path) -> None:
    with plug(Ser8250) as port:
        device = port.vdev._device
        assert device is not None
        room = [0]
        device.write = lambda data: min(len(data), room[0])  # type: ignore[method-assign]
        for _ in range(LINE_LIMIT + 1):
            port.vdev.mmio_write(0, THR, 1, 65)
        port.settle()
        assert not port.read(LSR, 1) & LSR_THRE
        port.write(IER, IER_THRE, 1)
        assert not port.irq.level
        room[0] = LINE_LIMIT
        port.ctx.worker.call(port.vdev._flush)  # as the host device does when it has room
        port.settle()
        assert port.irq.level
        assert port.read(LSR, 1) & LSR_THRE


def test_a_client_that_goes_and_comes_again_is_served(tmp_path: Path) -> None:
    path = tmp_path / "uart.sock"
    with plug(Ser8250, hostdev=f"unix:{path}") as port:
        port.write(FCR, FCR_ENABLE, 1)
        port.write(IER, IER_RECEIVED, 1)
        say(port, b"nobody hears this")
        port.settle()
        for words in (b"one", b"two"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(str(path))
                client.sendall(words)
                got = bytearray()
                while len(got) < len(words):
                    assert wait_for(lambda: port.irq.level)
                    got += text(port)
                assert got == words
                say(port, words)
                assert client.makefile("rb").read(len(words)) == words
            assert wait_for(lambda: not port.vdev.status()["host"]["connected"])


def test_a_looped_port_takes_no_more_than_its_fifo() -> None:
    """Nobody reads it but the guest: a FIFO without a bound would take the host's memory."""
    with plug(Ser8250) as port:
        port.write(FCR, FCR_ENABLE, 1)
        port.write(MCR, MCR_LOOP, 1)
        say(port, b"A" * 10 * FIFO)
        assert text(port) == b"A" * FIFO


def test_a_malformed_hostdev_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="hostdev"):
        plug(Ser8250, hostdev="unix:")


def test_an_absent_hostdev_is_a_host_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="absent"):
        plug(Ser8250, hostdev=f"<{tmp_path / 'absent'}")


def test_standard_streams_are_claimed() -> None:
    options = Ser8250.Options(hostdev="stdio")
    assert Ser8250.claims(options) == ("standard input", "standard output")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 4]), st.integers(0, 0xFF)), max_size=60))
def test_any_register_traffic_is_harmless(accesses: list[tuple[int, int, int]]) -> None:
    with plug(Ser8250) as port:
        for offset, size, value in accesses:
            port.write(offset, value, size)
            assert 0 <= port.read(offset, size) < 1 << (8 * size)
        assert port.ctx.faults == []
