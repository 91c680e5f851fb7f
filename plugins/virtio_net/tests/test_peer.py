"""The peer link: meeting, hello, going and coming, and ends that mean no good."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from qvm_virtio_net import link, patience, peer, spec
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.hello import VERSION, Hello, decode, encode, refusal, warnings
from qvm_virtio_net.testing import Guest, ethernet

from qvmcore.api import HostError
from qvmcore.testing.driver import MmioDriver, Piece
from qvmcore.testing.fakes import Plugged

Card = Callable[..., Plugged[VirtioNet]]
Pair = Callable[..., tuple[Guest, Guest]]
Until = Callable[[Callable[[], Any]], None]
GOOD = encode(Hello(VERSION, "lan0", "stranger", "net9", "02:00:00:00:00:99", 1500))


class Stranger:
    """A process that is no qvm, at the other end."""

    def __init__(self, path: Path, hello: bytes = GOOD) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.socket.connect(os.fspath(path))
                break
            except ConnectionRefusedError:
                # The socket has its name a moment before it listens.
                assert time.monotonic() < deadline, f"nobody listens at {path}"
                time.sleep(0.01)
        with contextlib.suppress(BrokenPipeError):  # refused before we could speak
            if hello:
                self.socket.send(hello)

    def hello(self) -> dict[str, Any]:
        """What the card says of itself, or of us."""
        answer: dict[str, Any] = json.loads(self.socket.recv(4096))
        return answer

    def gone(self) -> bool:
        """Whether the card has hung up."""
        try:
            return self.socket.recv(1 << 17) == b""
        except ConnectionResetError:
            return True


Strangers = Callable[..., Stranger]


@pytest.fixture
def stranger_at(tmp_path: Path) -> Iterator[Strangers]:
    """``stranger_at(hello=...)``: a stranger on the cable, gone after the test."""
    with contextlib.ExitStack() as stack:

        def make(hello: bytes = GOOD) -> Stranger:
            made = Stranger(tmp_path / "lan0", hello)
            stack.callback(made.socket.close)
            return made

        yield make


@pytest.fixture
def waiting(card: Card, until: Until, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """A guest whose card listens for the other end."""
    monkeypatch.setattr(peer, "RETRY_FIRST", 0.01)
    guest = Guest(card(peer="./lan0", mac="02:00:00:00:00:0a"))
    until((tmp_path / "lan0").exists)
    return guest


def test_either_end_may_come_back(card: Card, until: Until) -> None:
    """Cable out: link down and an interrupt; back: link up and an announcement."""
    first = card(peer="./lan0", mac="02:00:00:00:00:0a")
    second = card(peer="./lan0", mac="02:00:00:00:00:0b")
    guests = {"listener": Guest(first), "connector": Guest(second)}
    until(lambda: all(guest.link_up for guest in guests.values()))
    first.close()
    guest = guests["connector"]
    until(lambda: not guest.link_up)
    assert guest.driver.interrupt_status() & 2
    assert isinstance(guest.driver, MmioDriver)
    guest.driver.ack()
    third = card(peer="./lan0", mac="02:00:00:00:00:0c")
    other = Guest(third)
    until(lambda: guest.link_up and other.link_up)
    assert guest.driver.interrupt_status() & 2
    assert guest.status & spec.S_ANNOUNCE and not other.status & spec.S_ANNOUNCE
    assert guest.command(spec.CTRL_ANNOUNCE, spec.CTRL_ANNOUNCE_ACK)
    assert guest.status == spec.S_LINK_UP
    other.offer(2000)
    guest.send(ethernet())
    until(lambda: other.stats.rx_frames)
    assert third.vdev.status()["other_end"] == "vdev 'virtio-net_test' of VM 'test'"


def test_without_the_other_end_frames_are_lost_and_counted(waiting: Guest) -> None:
    assert not waiting.link_up
    assert waiting.send(ethernet()).done and waiting.stats.tx_no_link == 1


def test_the_link_is_for_two(waiting: Guest, until: Until, stranger_at: Strangers) -> None:
    first = stranger_at()
    assert first.hello()["link"] == "lan0"
    until(lambda: waiting.link_up)
    second = stranger_at()
    assert "taken by vdev 'net9' of VM 'stranger'" in second.hello()["refused"] and second.gone()
    assert waiting.link_up


@pytest.mark.parametrize(
    ("hello", "word"),
    [
        (b"\x16\x03\x01", "another protocol"),
        (b"{}", "another protocol"),
        (b"[" * 2048, "another protocol"),
        (b"x" * 60000, "another protocol"),
        (encode(Hello(VERSION + 1, "lan0")), "use one version"),
        (encode(Hello(VERSION, "lan1", "b", "net0")), "the options peer differ"),
    ],
)
def test_a_wrong_hello_is_refused_with_the_reason(
    waiting: Guest, stranger_at: Strangers, hello: bytes, word: str
) -> None:
    stranger = stranger_at(hello)
    assert "qvm_link" in stranger.hello() and word in stranger.hello()["refused"] and stranger.gone()
    assert not waiting.link_up and not waiting.device.ctx.faults


def test_an_end_that_says_nothing_gives_way(
    waiting: Guest, stranger_at: Strangers, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "HELLO_PATIENCE", 0.05)
    silent = stranger_at(b"")
    assert silent.hello() and "does not say hello" in silent.hello()["refused"] and silent.gone()
    stranger_at().hello()
    until(lambda: waiting.link_up)


@given(messages=st.lists(st.binary(max_size=200), max_size=30))
@example(messages=[b"x", bytes(12), bytes(70000), bytes(25), b"\xff" * 100, bytes(12) + ethernet()])
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_any_messages_leave_the_card_working(
    waiting: Guest, stranger_at: Strangers, messages: list[bytes]
) -> None:
    stranger = stranger_at()
    stranger.hello()
    good = bytes(12) + ethernet(payload=b"good")
    for message in [*(message for message in messages if message), good]:
        stranger.socket.send(message)
    waiting.driver.start()
    waiting.rx = waiting.driver.queues[0]
    waiting.offer(*[2000] * 40)
    for _ in range(2000):
        waiting.device.settle()
        stranger.socket.send(good)
        if any(frame == good[12:] for _, frame, _ in waiting.received()):
            break
    else:
        pytest.fail("the good frame never came")
    assert not waiting.device.ctx.faults and not waiting.driver.needs_reset
    stranger.socket.close()
    while waiting.link_up:
        waiting.device.settle()


def test_a_flood_is_held_back_by_the_socket(waiting: Guest, stranger_at: Strangers, until: Until) -> None:
    """A driver without buffers: the flooder gets no room, the card's memory does not grow."""
    stranger = stranger_at()
    stranger.hello()
    until(lambda: waiting.link_up)
    stranger.socket.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        for _ in range(100_000):
            stranger.socket.send(bytes(12) + ethernet(payload=bytes(1400)))
            sent += 1
    assert waiting.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\1"), "the card still answers"
    until(lambda: waiting.stats.rx_no_buffer == sent)


def test_frames_held_back_are_let_go_when_the_other_end_vanishes(
    waiting: Guest, stranger_at: Strangers, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 600.0)
    stranger = stranger_at()
    until(lambda: waiting.link_up)
    waiting.offer(2000)
    ring = waiting.tx
    piece = Piece(waiting.driver.ram.put(bytes(12) + ethernet(payload=bytes(1400))), 12 + 1414)
    for _ in range(1000):
        while ring.in_flight < ring.size - 1:
            ring.add_pieces([piece], [])
        ring.kick()
        waiting.device.settle()
        if not ring.reap():
            break
    else:
        pytest.fail("the socket takes everything")
    stranger.socket.close()
    until(lambda: ring.reap() is not None and not ring.in_flight)
    assert waiting.stats.tx_no_link


def test_the_socket_is_the_users_own(waiting: Guest, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "lan0").stat().st_mode) == 0o600


def test_a_socket_left_by_a_killed_vm_is_replaced(card: Card, until: Until, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(os.fspath(tmp_path / "lan0"))
    guests = [Guest(card(peer="./lan0")) for _ in range(2)]
    until(lambda: all(guest.link_up for guest in guests))


def test_a_file_in_the_way_is_never_removed(
    card: Card, until: Until, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lan0").write_text("mine")
    card(peer="./lan0")
    until(lambda: "it is no socket" in caplog.text)
    assert (tmp_path / "lan0").read_text() == "mine"


def test_one_end_only_is_worth_a_line(
    card: Card, until: Until, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "LONELY", 0.01)
    card(peer="./lan0")
    until(lambda: "nobody has come to the other end of peer link" in caplog.text)


def test_equal_addresses_and_unequal_mtus_are_warned_of(
    card: Card, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        guests = [Guest(card(peer="./lan0", mtu=mtu)) for mtu in (1500, 9000)]
        until(lambda: all(guest.link_up for guest in guests))
        until(lambda: "mtu is 1500 here and 9000 there" in caplog.text or "mtu is 9000 here" in caplog.text)
    assert "both ends have the address" in caplog.text


def test_link_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_own_folder", lambda: tmp_path)
    assert link.link_path("lan0", Path("/elsewhere")) == tmp_path / "lan0.link"
    assert link.link_path("./lan0", tmp_path) == tmp_path / "lan0"
    with pytest.raises(HostError, match="there is no folder"):
        link.link_path("missing/lan0", tmp_path)
    with pytest.raises(HostError, match="longer than a socket"):
        link.link_path("./" + "x" * 200, tmp_path)


def test_hello_is_cut_to_what_is_accepted_and_checked_both_ways() -> None:
    own = Hello(VERSION, "lan0", "a", "net0", "m", 1500)
    assert decode(encode(Hello(VERSION, "lan0", "x" * 500))).vm == "x" * 128
    assert refusal(own, own) == "" and warnings(own, own)
    assert "refused by the other end" in refusal(own, Hello(VERSION, refused="no"))


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_hello_is_read_or_refused(data: bytes) -> None:
    try:
        other = decode(data)
    except ValueError:
        return
    refusal(Hello(VERSION), other)
