"""Channel: bounded buffer, back-pressure, stall, pause, loss; nothing ever blocks."""

from __future__ import annotations

import os
import socket
import time
import tty
from collections.abc import Iterator

import pytest
from qvm_chardev.channel import Channel, nonblocking_copy
from qvm_chardev.testing import Owner, wait_for


class Pair:
    """A channel and the other end of its socket pair."""

    def __init__(self, owner: Owner, limit: int, stall: float) -> None:
        ours, self.far = socket.socketpair()
        ours.setblocking(False)
        self.far.setblocking(False)
        self.lost: list[OSError | None] = []
        self.channel = Channel(
            ours.detach(), worker=owner.worker, on_space=owner.wiring().on_writable, on_lost=self.lost.append,
            on_input=owner.input.extend, limit=limit, stall=stall,
        )  # fmt: skip
        self.channel.start()

    def drain(self) -> bytes:
        """Everything the far end can read now."""
        data = b""
        try:
            while part := self.far.recv(1 << 20):
                data += part
        except BlockingIOError:
            pass
        return data


@pytest.fixture
def pair(owner: Owner) -> Iterator[Pair]:
    pair = Pair(owner, limit=1000, stall=30.0)
    yield pair
    pair.channel.close()
    pair.far.close()


def _fill(channel: Channel, piece: bytes = b"x" * 50_000) -> int:
    total = 0
    while taken := channel.write(piece):
        total += taken
    return total


def test_a_full_receiver_holds_the_writer_back_and_then_says_so(owner: Owner, pair: Pair) -> None:
    total = _fill(pair.channel)
    assert pair.channel.write(b"y") == 0 and not owner.writable
    received = pair.drain()
    assert wait_for(lambda: owner.writable)
    time.sleep(0.02)
    received += pair.drain()
    assert len(received) == total and pair.channel.dropped == 0
    assert pair.channel.write(b"again") == 5


def test_order_and_bytes_survive_back_pressure(owner: Owner, pair: Pair) -> None:
    data = bytes(range(256)) * 8000
    sent, received = 0, b""
    while sent < len(data):
        taken = pair.channel.write(data[sent:])
        sent += taken
        received += pair.drain()
    assert wait_for(lambda: not pair.channel._pending)
    assert received + pair.drain() == data


def test_a_receiver_that_takes_nothing_counts_as_gone_until_it_reads(owner: Owner) -> None:
    pair = Pair(owner, limit=1000, stall=0.05)
    _fill(pair.channel)
    assert wait_for(lambda: pair.channel.stalled)
    assert owner.writable == 1
    assert pair.channel.write(b"lost") == 4 and pair.channel.dropped == 4
    pair.drain()
    assert wait_for(lambda: not pair.channel.stalled)
    wait_for(lambda: not pair.channel._pending)
    pair.drain()
    assert pair.channel.write(b"back") == 4
    assert pair.drain() == b"back"
    pair.channel.close()
    pair.far.close()


def test_a_receiver_that_goes_away_frees_the_writer(owner: Owner, pair: Pair) -> None:
    _fill(pair.channel)
    pair.far.close()
    assert wait_for(lambda: pair.lost and owner.writable)
    assert pair.channel.write(b"abc") == 3
    assert pair.channel.dropped >= 3


def test_paused_input_stays_with_the_host(owner: Owner, pair: Pair) -> None:
    pair.channel.pause_input(True)
    pair.far.send(b"hello")
    time.sleep(0.05)
    assert not owner.input
    pair.channel.pause_input(False)
    assert wait_for(lambda: owner.input == b"hello")


def test_end_of_file_is_reported_once_and_costs_nothing_afterwards(owner: Owner, pair: Pair) -> None:
    pair.far.close()
    assert wait_for(lambda: pair.lost)
    before = time.thread_time(), time.process_time()
    time.sleep(0.2)
    assert pair.lost == [None]
    assert time.process_time() - before[1] < 0.1


def test_flush_writes_out_the_buffer_within_its_time(owner: Owner, pair: Pair) -> None:
    total = _fill(pair.channel)
    started = time.monotonic()
    assert not pair.channel.flush(0.2)
    assert 0.15 < time.monotonic() - started < 1.0
    received = pair.drain()
    assert pair.channel.flush(2.0)
    assert len(received + pair.drain()) == total


def test_close_twice(pair: Pair) -> None:
    pair.channel.close()
    pair.channel.close()
    assert pair.channel.write(b"abc") == 3


def test_a_blocking_descriptor_is_never_blocked_on(owner: Owner) -> None:
    read_end, write_end = os.pipe()
    lost: list[OSError | None] = []
    channel = Channel(write_end, worker=owner.worker, on_space=lambda: None, on_lost=lost.append, limit=1000)
    started = time.monotonic()
    _fill(channel)
    assert time.monotonic() - started < 2
    channel.close()
    os.close(read_end)


def test_a_blocking_terminal_is_never_blocked_on(owner: Owner) -> None:
    """One that belongs to another user cannot be opened again, and stays blocking."""
    master, slave = os.openpty()
    tty.setraw(slave)
    channel = Channel(
        slave, worker=owner.worker, on_space=lambda: None, on_lost=lambda error: None, limit=1000
    )
    started = time.monotonic()
    _fill(channel)
    assert time.monotonic() - started < 2
    os.close(master)
    channel.close()


def test_a_copy_of_standard_output_leaves_it_blocking() -> None:
    read_end, write_end = os.pipe()
    copy = nonblocking_copy(write_end, os.O_WRONLY)
    assert os.get_blocking(write_end) and not os.get_blocking(copy)
    for fd in (read_end, write_end, copy):
        os.close(fd)
