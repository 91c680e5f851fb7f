"""Cards on a real tap interface and on a real passt, in a network namespace of the test's own."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_net import offload, spec, tap
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.testing import Guest

from qvmcore.api import HostError
from qvmcore.testing.fakes import Plugged

Card = Callable[..., Plugged[VirtioNet]]
Until = Callable[[Callable[[], Any]], None]
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
MAC = bytes.fromhex("020000000001")
OURS, HOST = bytes([192, 0, 2, 2]), bytes([192, 0, 2, 1])


def ip(*words: str) -> str:
    """Run ``ip`` in the namespace of this thread."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespace() -> Iterator[None]:
    """This thread alone is in a fresh network namespace; it goes with the test."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip`: apt-get install iproute2")
    with Path("/proc/thread-self/ns/net").open() as before:
        if _LIBC.unshare(_CLONE_NEWNET):
            pytest.skip(f"no network namespace of our own: {os.strerror(ctypes.get_errno())}")
        try:
            ip("link", "set", "lo", "up")
            yield
        finally:
            assert _LIBC.setns(before.fileno(), _CLONE_NEWNET) == 0


@pytest.fixture
def tun(namespace: None) -> None:
    """Skips where there are no tap interfaces."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"no tap interfaces: /dev/net/tun: {error.strerror}")


def packet(protocol: int, payload: bytes, to: bytes = HOST) -> bytes:
    """An IPv4 packet."""
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0, OURS, to)
    total = ~offload.ones_sum(head) & 0xFFFF
    return head[:10] + struct.pack(">H", total) + head[12:] + payload


def arp(to: bytes) -> bytes:
    """Who has this address?"""
    body = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, MAC, OURS, bytes(6), to)
    return b"\xff" * 6 + MAC + b"\x08\x06" + body


def echo(size: int) -> bytes:
    """An ICMP echo request."""
    body = struct.pack(">BBHHH", 8, 0, 0, 1, 1) + bytes(i & 0xFF for i in range(size))
    return packet(1, body[:2] + struct.pack(">H", ~offload.ones_sum(body) & 0xFFFF) + body[4:])


def segment(flags: int, sequence: int, ack: int, port: int, to: bytes, data: bytes = b"") -> bytes:
    """A TCP segment from port 4000."""
    tcp = struct.pack(">HHIIBBHHH", 4000, port, sequence, ack, 0x50, flags, 8192, 0, 0) + data
    total = offload.ones_sum(OURS + to + struct.pack(">HH", 6, len(tcp)) + tcp)
    return packet(6, tcp[:16] + struct.pack(">H", ~total & 0xFFFF) + tcp[18:], to)


class Wire:
    """A guest that asks and waits for the answer; other traffic is ignored."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        guest.offer(*[2048] * 200)

    def ask(self, frame: bytes, wanted: Callable[[bytes], bool]) -> bytes:
        """Send a frame; the first wanted answer."""
        self.guest.send(frame)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for _, answer, _ in self.guest.received():
                if wanted(answer):
                    return answer
            time.sleep(0.01)
        pytest.fail(f"no answer; {self.guest.device.vdev.status()}")

    def find(self, address: bytes) -> bytes:
        """The MAC of an IPv4 address."""
        answer = self.ask(arp(address), lambda f: f[12:14] == b"\x08\x06" and f[28:32] == address)
        return answer[22:28]


def test_tap_ping_and_offloads(card: Card, tun: None) -> None:
    ip("tuntap", "add", "dev", "tq0", "mode", "tap")
    ip("addr", "add", "192.0.2.1/24", "dev", "tq0")
    ip("link", "set", "tq0", "up")
    guest = Guest(card(tap="tq0", mac="02:00:00:00:00:01"))
    assert guest.link_up
    wire = Wire(guest)
    host = wire.find(HOST)
    frame = host + MAC + b"\x08\x00" + echo(1000)
    answer = wire.ask(frame, lambda f: f[12:14] == b"\x08\x00" and f[23] == 1 and f[34] == 0)
    assert answer[42:] == frame[42:]
    # Without the interface being up the host takes nothing; with it removed the cable is out.
    ip("link", "set", "tq0", "down")
    guest.send(frame)
    assert guest.stats.tx_no_link == 1
    assert guest.device.vdev.status()["hostdev"] == "tap tq0"


def test_tap_removed_is_a_cable_out(card: Card, tun: None, until: Until) -> None:
    ip("tuntap", "add", "dev", "tq0", "mode", "tap")
    ip("link", "set", "tq0", "up")
    guest = Guest(card(tap="tq0"))
    ip("link", "del", "tq0")
    until(lambda: not guest.link_up)
    assert guest.send(bytes(60)).done and not guest.device.ctx.faults


def test_5_1_9_5_6_tap_with_two_queue_pairs(card: Card, tun: None) -> None:
    device = card(tap="tq0", queues=2, mac="02:00:00:00:00:01")
    ip("addr", "add", "192.0.2.1/24", "dev", "tq0")
    ip("link", "set", "tq0", "up")
    guest = Guest(device)
    assert guest.driver.config(8, 2) == 2 and len(guest.driver.queues) == 5
    host = Wire(guest).find(HOST)
    pairs = spec.CTRL_MQ, spec.CTRL_MQ_VQ_PAIRS_SET
    assert not guest.command(*pairs, b"\0\0") and not guest.command(*pairs, b"\3\0")
    assert guest.command(*pairs, b"\2\0")
    # The kernel answers on the pair a flow was sent from.
    guest.rx, guest.tx = guest.driver.queues[2:4]
    wire = Wire(guest)
    wire.ask(
        host + MAC + b"\x08\x00" + segment(2, 100, 0, 9, HOST),
        lambda f: f[12:14] == b"\x08\x00" and f[23] == 6 and f[47] & 0x04 == 0x04,
    )
    assert guest.command(*pairs, b"\1\0")
    # A detached descriptor reports an error for ever: nobody may wait for it.
    host_side = device.vdev._host
    assert isinstance(host_side, tap.Tap) and [i._read for i in host_side._interests] == [True, False]
    # 5.1.2: without MQ the third queue is the control queue, and all is on the first pair again.
    guest = Guest(device, 1 << 32 | spec.F_CTRL_VQ | spec.F_CTRL_RX | spec.F_MRG_RXBUF)
    guest.control = guest.driver.queues[2]
    assert guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\1")
    assert Wire(guest).find(HOST) == host


def test_tap_errors_say_what_to_do(
    card: Card, tun: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(tap="tq0")
    with pytest.raises(HostError, match="another program, or another vdev, has it"):
        card(tap="tq0")
    ip("tuntap", "add", "dev", "dq0", "mode", "tun")
    with pytest.raises(HostError, match="no tap, or not made without multi_queue"):
        card(tap="dq0")
    monkeypatch.setattr(tap, "_DEVICE", os.fspath(tmp_path / "tun"))
    with pytest.raises(HostError, match="modprobe tun"):
        card(tap="tq1")


def test_tap_without_privilege_says_how_to_make_one(card: Card, tun: None) -> None:
    hint = tap.Tap("tq0", 2, None, "net0")._hint(OSError(1, "no"))  # type: ignore[arg-type]
    assert "ip tuntap add dev tq0 mode tap user $USER multi_queue" in hint


# ---- passt ---------------------------------------------------------------------------------------


@pytest.fixture
def passt(namespace: None) -> None:
    """A namespace with a default route, as passt needs; skips where passt is not installed."""
    if shutil.which("passt") is None:
        pytest.skip("no passt: apt-get install passt")
    ip("tuntap", "add", "dev", "dq0", "mode", "tap")
    ip("addr", "add", "192.0.2.2/24", "dev", "dq0")
    ip("link", "set", "dq0", "up")
    ip("route", "add", "default", "via", "192.0.2.1")


def passt_of(guest: Guest) -> int:
    """Its process."""
    pid = guest.device.vdev.status()["passt_pid"]
    assert isinstance(pid, int)
    return pid


def test_passt_tcp_to_the_host(card: Card, passt: None, until: Until) -> None:
    """The gateway's address is the host's loopback: a connection from the guest arrives there."""
    guest = Guest(card(user=True, mac="02:00:00:00:00:01", passt_options=["-4"]))
    process = passt_of(guest)
    wire = Wire(guest)
    gateway = wire.find(HOST)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        port = server.getsockname()[1]
        head = gateway + MAC + b"\x08\x00"

        def answers(flags: int) -> Callable[[bytes], bool]:
            return lambda f: f[12:14] == b"\x08\x00" and f[23] == 6 and f[47] & flags == flags

        synack = wire.ask(head + segment(0x02, 100, 0, port, HOST), answers(0x12))
        ack = int.from_bytes(synack[38:42], "big") + 1
        guest.send(head + segment(0x10, 101, ack, port, HOST))
        guest.send(head + segment(0x18, 101, ack, port, HOST, b"from the guest"))
        connection, _ = server.accept()
        with connection:
            connection.settimeout(20)
            assert connection.recv(100) == b"from the guest"
            connection.sendall(b"from the host")
            wire.ask(head + segment(0x10, 115, ack, port, HOST), lambda f: b"from the host" in f)
    guest.device.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_passt_that_dies_is_a_cable_out(card: Card, passt: None, until: Until) -> None:
    guest = Guest(card(user=True))
    assert guest.link_up
    os.kill(passt_of(guest), 9)
    until(lambda: not guest.link_up)
    assert guest.send(bytes(60)).done and guest.stats.tx_no_link == 1


def test_passt_that_refuses_its_options_says_so(
    card: Card, passt: None, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    guest = Guest(card(user=True, passt_options=["--nonsense"]))
    until(lambda: not guest.link_up)
    until(lambda: "the cable is out; its last words:" in caplog.text)
