"""The stream to passt, with a stand-in for it: frames behind their lengths, cut anywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_net import patience, spec
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.testing import Guest, ethernet

from qvmcore.testing.fakes import Plugged

Card = Callable[..., Plugged[VirtioNet]]
Until = Callable[[Callable[[], Any]], None]
Program = Callable[[str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """``program(code)``: what is found as passt runs this Python with ``fd``, then waits for the end."""

    def make(code: str) -> None:
        path = tmp_path / "passt"
        path.write_text(
            f"#!{sys.executable} -SE\nimport os, sys, time\nfd = int(sys.argv[sys.argv.index('--fd') + 1])\n"
            f"{code}\nwhile os.read(fd, 1 << 16):\n    pass\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", os.fspath(tmp_path))

    return make


def stream(*frames: bytes) -> bytes:
    """Frames as passt sends them."""
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


@pytest.mark.parametrize("size", [1, 3, 7, 63, 1000])
def test_frames_cut_anywhere_arrive_whole(card: Card, until: Until, program: Program, size: int) -> None:
    frames = [ethernet(payload=bytes([number]) * 30) for number in range(5)]
    program(
        f"data = {stream(*frames)!r}\nfor i in range(0, len(data), {size}): os.write(fd, data[i:i+{size}])"
    )
    device = card(user=True)
    guest = Guest(device)
    guest.offer(*[2000] * 8)
    until(lambda: guest.stats.rx_frames + guest.stats.rx_no_driver == 5)
    received = [frame for _, frame, _ in guest.received()]
    assert received == frames[len(frames) - len(received) :]


def test_what_the_guest_sends_is_sent_in_order_and_whole(card: Card, until: Until, program: Program) -> None:
    """The stand-in sends back what it is sent; far more than its socket holds, which it reads late."""
    program(
        "time.sleep(0.3)\nwhile data := os.read(fd, 4000):\n    while data: data = data[os.write(fd, data):]"
    )
    guest = Guest(card(user=True, mtu=9000))
    guest.offer(*[9100] * 200)
    frames = [ethernet(payload=bytes([number]) * 8000) for number in range(150)]
    for frame in frames:
        guest.tx.add([bytes(12) + frame], [])
    guest.tx.kick()
    until(lambda: guest.stats.rx_frames == len(frames))
    assert [frame for _, frame, _ in guest.received()] == frames
    assert guest.stats.tx_frames == len(frames)


def test_a_program_that_takes_nothing_costs_frames_not_the_card(
    card: Card, until: Until, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    program("time.sleep(1000)")
    guest = Guest(card(user=True, mtu=9000))
    for _ in range(200):
        guest.tx.add([bytes(12) + ethernet(payload=bytes(8000))], [])
    guest.tx.kick()
    until(lambda: guest.tx.reap() is not None and not guest.tx.in_flight)
    assert guest.stats.tx_stalled and guest.stats.tx_frames + guest.stats.tx_stalled == 200
    assert guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\1")


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", (spec.FRAME_BYTES_MAX + 1).to_bytes(4, "big")])
def test_a_length_that_cannot_be_is_a_cable_out(
    card: Card, until: Until, program: Program, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    program(f"os.write(fd, {data!r})")
    guest = Guest(card(user=True))
    until(lambda: not guest.link_up)
    until(lambda: "it sent a frame of" in caplog.text)
    assert not guest.device.ctx.faults


def test_frames_too_short_are_dropped(card: Card, until: Until, program: Program) -> None:
    program(f"os.write(fd, {stream(b'', b'x', bytes(13))!r})")
    guest = Guest(card(user=True))
    guest.offer(2000)
    until(lambda: guest.stats.rx_malformed + guest.stats.rx_no_driver == 3)
    assert not guest.received()
