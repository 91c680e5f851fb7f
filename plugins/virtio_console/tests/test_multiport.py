"""A console with several ports as a driver sees it (virtio 1.4, 5.3.6.2)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from multiport import MultiportDriver
from qvm_chardev import channel
from qvm_chardev.testing import wait_for
from qvm_virtio_console import spec
from qvm_virtio_console.device import VirtioConsole
from qvm_virtio_console.options import MAX_FURTHER_PORTS, ConsoleOptions, PortOptions
from qvm_virtio_console.spec import Event

from qvmcore.api import ConfigError
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug

Console = Callable[..., Plugged[VirtioConsole]]
LOG = {"name": "log", "hostdev": ">log"}


def _connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(str(path))
    return client


def test_5_3_2_queues_and_5_3_4_max_nr_ports(console: Console) -> None:
    device = console(hostdev="null", ports=[LOG, {"name": "b", "hostdev": "null"}])
    driver = MmioDriver.of(device)
    driver.start()
    assert driver.features & spec.F_MULTIPORT
    assert [driver.queue_size_max(index) for index in range(10)] == [128] * 8 + [0, 0]
    assert driver.config(4, 4) == 3


def test_5_3_6_2_ports_are_added_once_after_device_ready(console: Console) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=[LOG]))
    assert multi.listen() == [], "nothing before the driver is ready"
    multi.say(Event.DEVICE_READY)
    multi.say(Event.DEVICE_READY)
    assert [(port, event) for port, event, _, _ in multi.said] == [
        (0, Event.DEVICE_ADD), (1, Event.DEVICE_ADD),
    ]  # fmt: skip


def test_5_3_6_2_a_ready_port_gets_its_kind_name_and_state(console: Console) -> None:
    ports = [LOG, {"name": "tty2", "hostdev": "null", "console": True}, {"name": "s", "hostdev": "unix:s"}]
    multi = MultiportDriver(console(hostdev="null", ports=ports))
    multi.greet()
    said = [message for message in multi.said if message[1] is not Event.DEVICE_ADD]
    assert said == [
        (0, Event.CONSOLE_PORT, 1, b""),
        (0, Event.PORT_OPEN, 1, b""),
        (1, Event.PORT_NAME, 1, b"log"),
        (1, Event.PORT_OPEN, 1, b""),
        (2, Event.CONSOLE_PORT, 1, b""),
        (2, Event.PORT_NAME, 1, b"tty2"),
        (2, Event.PORT_OPEN, 1, b""),
        (3, Event.PORT_NAME, 1, b"s"),
        (3, Event.PORT_OPEN, 0, b""),
    ]


def test_5_3_6_2_a_client_that_comes_and_goes_is_port_open(console: Console, tmp_path: Path) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=[{"name": "s", "hostdev": "unix:s"}]))
    multi.greet()
    client = _connect(tmp_path / "s")
    assert wait_for(multi.listen)
    assert multi.said[-1] == (1, Event.PORT_OPEN, 1, b"")
    client.close()
    assert wait_for(multi.listen)
    assert multi.said[-1] == (1, Event.PORT_OPEN, 0, b"")


def test_a_pty_that_is_opened_and_closed_is_port_open(console: Console, tmp_path: Path) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=[{"name": "p", "hostdev": "pty:p"}]))
    multi.greet()
    fd = os.open(tmp_path / "p", os.O_RDWR | os.O_NOCTTY)
    assert wait_for(multi.listen)
    assert multi.said[-1] == (1, Event.PORT_OPEN, 1, b"")
    os.close(fd)
    assert wait_for(multi.listen)
    assert multi.said[-1] == (1, Event.PORT_OPEN, 0, b"")


def test_every_port_goes_to_its_own_hostdev(console: Console, tmp_path: Path) -> None:
    command = f">|dd status=none of={tmp_path / 'cmd'}"
    ports = [LOG, {"name": "c", "hostdev": command}, {"name": "s", "hostdev": "unix:s"}]
    device = console(hostdev=">out", ports=ports)
    multi = MultiportDriver(device)
    multi.greet()
    client = _connect(tmp_path / "s")
    assert wait_for(multi.listen)
    for port, text in enumerate((b"zero", b"one", b"two", b"three")):
        assert multi.send(port, text).done
    assert (tmp_path / "out").read_bytes() == b"zero"
    assert (tmp_path / "log").read_bytes() == b"one"
    assert client.recv(64) == b"three"
    device.terminate()
    assert (tmp_path / "cmd").read_bytes() == b"two"
    client.close()


def test_5_3_6_2_input_waits_until_the_guest_opens_the_port(console: Console, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"first words")
    device = console(hostdev="null", ports=[{"name": "in", "hostdev": "<in"}])
    multi = MultiportDriver(device)
    multi.greet()
    buffer = multi.room(1, 64)
    assert multi.got(1, buffer) is None
    multi.say(Event.PORT_OPEN, 1)
    assert multi.got(1, buffer) == b"first words"


def test_a_port_the_guest_closed_gets_no_input(console: Console, tmp_path: Path) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=[{"name": "s", "hostdev": "unix:s"}]))
    multi.greet()
    client = _connect(tmp_path / "s")
    multi.say(Event.PORT_OPEN, 1)
    multi.say(Event.PORT_OPEN, 1, 0)
    buffer = multi.room(1, 64)
    client.send(b"late")
    assert wait_for(lambda: multi.device.vdev.status()["ports"]["s"]["waiting_input"] == 4)
    assert multi.got(1, buffer) is None
    multi.say(Event.PORT_OPEN, 1)
    assert multi.got(1, buffer) == b"late"
    client.close()


def test_a_port_whose_host_takes_nothing_holds_back_no_other(console: Console, tmp_path: Path) -> None:
    device = console(hostdev=">out", ports=[{"name": "slow", "hostdev": "unix:s"}, LOG])
    multi = MultiportDriver(device)
    multi.greet()
    client = _connect(tmp_path / "s")
    assert wait_for(multi.listen)
    data = os.urandom(40_000)
    stuck = [multi.send(1, data) for _ in range(20)]
    assert not stuck[-1].done, "800000 bytes fit nowhere"
    for _ in range(50):
        assert multi.send(0, b"x").done and multi.send(2, b"y").done
    assert (tmp_path / "out").read_bytes() == b"x" * 50
    assert (tmp_path / "log").read_bytes() == b"y" * 50
    received = b""
    while len(received) < 800_000:
        received += client.recv(65536)
    assert received == data * 20
    ring = multi.driver.queues[spec.receiveq(1) + 1]
    assert wait_for(lambda: ring.reap() or all(request.done for request in stuck))
    client.close()


def test_only_a_console_gives_a_receiver_up_that_takes_nothing(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "STALL_SECONDS", 0.02)
    ports = [
        {"name": "data", "hostdev": "unix:d"},
        {"name": "tty", "hostdev": "unix:t", "console": True},
    ]
    multi = MultiportDriver(console(hostdev="null", ports=ports))
    multi.greet()
    clients = [_connect(tmp_path / name) for name in ("d", "t")]
    assert wait_for(lambda: multi.listen() is not None and multi.said[-1][2:] == (1, b""))
    data = [multi.send(1, bytes(40_000)) for _ in range(20)]
    tty = [multi.send(2, bytes(40_000)) for _ in range(20)]

    def dropped(port: str) -> int:
        return int(multi.device.vdev.status()["ports"][port]["dropped"])

    ring = multi.driver.queues[spec.receiveq(2) + 1]
    assert wait_for(lambda: ring.reap() is not None and all(request.done for request in tty))
    assert dropped("tty") > 0
    assert dropped("data") == 0 and not data[-1].done
    clients[0].close()
    ring = multi.driver.queues[spec.receiveq(1) + 1]
    assert wait_for(lambda: ring.reap() is not None and all(request.done for request in data))
    clients[1].close()


def test_a_reset_closes_the_ports_and_forgets_the_rest(console: Console, tmp_path: Path) -> None:
    device = console(hostdev="null", ports=[{"name": "s", "hostdev": "unix:s"}])
    multi = MultiportDriver(device)
    multi.greet()
    client = _connect(tmp_path / "s")
    assert wait_for(multi.listen)
    multi.say(Event.PORT_OPEN, 1)
    for _ in range(20):
        multi.send(1, bytes(40_000))
    multi.driver.reset()
    assert [(port.guest_open, port.ready, port._partial) for port in device.vdev._ports] == [
        (False, False, None)
    ] * 2
    again = MultiportDriver(device)
    client.send(b"for the new driver")
    buffer = again.room(1, 64)
    again.greet()
    assert (1, Event.PORT_OPEN, 1, b"") in again.said
    assert again.got(1, buffer) is None
    again.say(Event.PORT_OPEN, 1)
    assert wait_for(lambda: again.got(1, buffer) == b"for the new driver")
    assert not device.ctx.faults
    client.close()


def test_a_driver_without_multiport_has_one_port_that_is_open(console: Console, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"typed")
    device = console(hostdev="<in", ports=[LOG])
    driver = MmioDriver.of(device)
    driver.start(~spec.F_MULTIPORT)
    buffer = driver.queues[0].submit([], [16])
    ignored = [driver.queues[index].submit([bytes(8)]) for index in (3, 5)]
    device.settle()
    for ring in driver.queues:
        ring.reap()
    assert buffer.result()[:5] == b"typed"
    assert not any(request.done for request in ignored)
    assert (tmp_path / "log").read_bytes() == b""


def test_5_3_6_2_resize_is_told_to_the_port_on_the_terminal(
    console: Console, terminal: tuple[int, int]
) -> None:
    device = console(hostdev="null", ports=[{"name": "tty", "hostdev": "stdio", "console": True}])
    multi = MultiportDriver(device)
    multi.greet()
    assert not multi.driver.features & spec.F_SIZE, "that is the size of the first port"
    assert (1, Event.RESIZE, 0, struct.pack("<HH", 80, 24)) in multi.said
    fcntl.ioctl(terminal[1], termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    assert wait_for(multi.listen)
    assert multi.said[-1] == (1, Event.RESIZE, 0, struct.pack("<HH", 132, 50))


def test_5_3_4_and_5_3_6_2_the_size_of_the_first_port_is_told_both_ways(
    console: Console, terminal: tuple[int, int]
) -> None:
    device = console(ports=[LOG])
    multi = MultiportDriver(device)
    multi.greet()
    assert (0, Event.RESIZE, 0, struct.pack("<HH", 80, 24)) in multi.said
    assert (multi.driver.config(0, 2), multi.driver.config(2, 2)) == (80, 24)
    multi.send(0, b"first output")
    assert not multi.driver.interrupt_status() & 2, "RESIZE has said it; no configuration change is made up"
    fcntl.ioctl(terminal[1], termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    assert wait_for(multi.listen)
    assert multi.said[-1] == (0, Event.RESIZE, 0, struct.pack("<HH", 132, 50))
    assert (multi.driver.config(0, 2), multi.driver.config(2, 2)) == (132, 50)


def test_status_tells_every_port(console: Console) -> None:
    status = json.loads(json.dumps(dict(console(hostdev="null", ports=[LOG]).vdev.status())))
    assert status["ports"]["log"]["hostdev"].endswith("log")


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ([LOG, LOG], "two ports are called 'log'"),
        ([{"name": "a", "hostdev": ""}], "hostdev is empty"),
        ([{"name": "a/b", "hostdev": "null"}], "name"),
        ([{"name": "x" * 65, "hostdev": "null"}], "name"),
        ([{"name": "a"}], "missing key 'hostdev'"),
        ([{"name": "a", "hostdev": "null", "consol": True}], "unknown key 'consol'"),
        ([{"name": "a", "hostdev": ">-"}], "port 'a' and the console both want standard output"),
        ([{"name": f"p{n}", "hostdev": "null"} for n in range(MAX_FURTHER_PORTS + 1)], "at most 30"),
    ],
)
def test_ports_that_cannot_be_are_refused_with_their_name(
    ports: list[dict[str, object]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plug(VirtioConsole, {"ports": ports}, base_dir=tmp_path)


def test_claims_cover_all_ports() -> None:
    options = ConsoleOptions(hostdev="<-", ports=[PortOptions(name="a", hostdev=">-")])
    assert VirtioConsole.claims(options) == ("standard input", "standard output")
