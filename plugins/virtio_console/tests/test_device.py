"""The console as a driver sees it (virtio 1.4, 5.3)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from qvm_chardev.testing import wait_for
from qvm_virtio_console import spec
from qvm_virtio_console.device import VirtioConsole
from qvm_virtio_console.options import ConsoleOptions

from qvmcore.api import HostError
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug

Console = Callable[..., Plugged[VirtioConsole]]
MMIO_STATUS = 0x070
RX, TX = spec.RECEIVEQ, spec.TRANSMITQ


def _driver(device: Plugged[VirtioConsole]) -> MmioDriver:
    driver = MmioDriver.of(device)
    driver.start()
    return driver


def _send(device: Plugged[VirtioConsole], driver: MmioDriver, *parts: bytes) -> bool:
    request = driver.queues[TX].submit(list(parts), [])
    device.settle()
    driver.queues[TX].reap()
    return request.done


@pytest.fixture
def client(console: Console, tmp_path: Path) -> tuple[Plugged[VirtioConsole], MmioDriver, socket.socket]:
    """A started console on a socket, its driver and its client."""
    device = console(hostdev="unix:s")
    driver = _driver(device)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(str(tmp_path / "s"))
    assert wait_for(lambda: device.vdev.status()["connected"])
    return device, driver, client


def test_5_3_6_transmit(console: Console, tmp_path: Path) -> None:
    device = console(hostdev="> out")
    driver = _driver(device)
    assert _send(device, driver, b"hello ")
    assert _send(device, driver, b"scat", b"tered", b"\n")
    assert (tmp_path / "out").read_bytes() == b"hello scattered\n"
    assert device.vdev.status()["sent"] == 16


def test_5_3_6_receive_fills_buffers_in_order(console: Console, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(range(100)))
    device = console(hostdev="<in")
    driver = _driver(device)
    requests = [driver.queues[RX].submit([], [size]) for size in (10, 30, 20)]
    assert wait_for(lambda: len(driver.queues[RX].reap()) > 0 or all(r.done for r in requests))
    device.settle()
    driver.queues[RX].reap()
    assert [request.length for request in requests] == [10, 30, 20]
    assert b"".join(request.result() for request in requests) == bytes(range(60))
    more = driver.queues[RX].submit([], [64])
    device.settle()
    driver.queues[RX].reap()
    assert more.length == 40 and more.result()[:40] == bytes(range(60, 100))


def test_input_before_the_driver_is_ready_waits_for_it(console: Console, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"early")
    device = console(hostdev="<in")
    assert wait_for(lambda: device.vdev.status()["waiting_input"] == 5)
    driver = _driver(device)
    request = driver.queues[RX].submit([], [64])
    device.settle()
    driver.queues[RX].reap()
    assert request.length == 5 and request.result()[:5] == b"early"


def test_input_a_guest_does_not_read_stays_bounded(
    client: tuple[Plugged[VirtioConsole], MmioDriver, socket.socket],
) -> None:
    device, driver, far = client
    far.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += far.send(b"z" * 4096)
    assert len(device.vdev._first._input) <= 8192
    received = 0
    while received < sent:
        request = driver.queues[RX].submit([], [4096])
        assert wait_for(lambda: driver.queues[RX].reap())
        received += request.length or 0
        driver.ram.release(driver.ram.mark() - 4096)
    assert received == sent
    far.close()


def test_a_slow_client_holds_the_guest_back_and_loses_nothing(
    client: tuple[Plugged[VirtioConsole], MmioDriver, socket.socket],
) -> None:
    device, driver, far = client
    data = os.urandom(40_000)
    ring = driver.queues[TX]
    requests = [ring.submit([data]) for _ in range(20)]
    device.settle()
    ring.reap()
    assert not requests[-1].done, "800000 bytes fit nowhere"
    received = b""
    while len(received) < 800_000:
        received += far.recv(65536)
    assert received == data * 20
    assert wait_for(lambda: ring.reap() or all(request.done for request in requests))
    device.settle()
    ring.reap()
    assert all(request.length == 0 for request in requests)
    assert device.vdev.status()["dropped"] == 0
    far.close()


def test_a_client_that_goes_away_frees_the_guest(
    client: tuple[Plugged[VirtioConsole], MmioDriver, socket.socket],
) -> None:
    device, driver, far = client
    ring = driver.queues[TX]
    requests = [ring.submit([bytes(40_000)]) for _ in range(20)]
    device.settle()
    far.close()
    assert wait_for(lambda: ring.reap() or all(request.done for request in requests))
    assert wait_for(lambda: ring.reap() is not None and not ring.in_flight)
    assert _send(device, driver, b"nobody listens")


def test_reset_while_held_back(client: tuple[Plugged[VirtioConsole], MmioDriver, socket.socket]) -> None:
    device, driver, far = client
    for _ in range(20):
        driver.queues[TX].submit([bytes(40_000)])
    device.settle()
    assert device.vdev._first._partial is not None
    device.write(MMIO_STATUS, 0)
    assert device.vdev._first._partial is None, "the rest belongs to the old driver"
    again = _driver(device)
    far.setblocking(False)

    def drained() -> bool:
        try:
            while far.recv(1 << 20):
                pass
        except BlockingIOError:
            pass
        return again.queues[TX].reap() != [] or not again.queues[TX].in_flight

    again.queues[TX].submit([b"after"])
    assert wait_for(drained)
    assert not device.ctx.faults
    far.close()


def test_5_3_4_emergency_write_needs_no_driver(console: Console, tmp_path: Path) -> None:
    device = console(hostdev=">out")
    driver = MmioDriver.of(device)
    for char in b"PANIC":
        driver.write_config(8, 4, char)
    driver.write_config(8, 4, 0x41424300 | ord("!"))
    driver.write_config(8, 1, ord("\n"))
    assert (tmp_path / "out").read_bytes() == b"PANIC!\n"
    assert driver.offered() & spec.F_EMERG_WRITE
    assert driver.config(8, 4) == 0


def test_5_3_4_one_port_and_no_size_without_a_terminal(console: Console) -> None:
    driver = _driver(console(hostdev="null"))
    assert not driver.features & spec.F_SIZE
    assert (driver.config(0, 4), driver.config(4, 4)) == (0, 1)


def test_5_3_4_size_and_its_change(console: Console, terminal: tuple[int, int]) -> None:
    device = console()
    driver = _driver(device)
    assert driver.features & spec.F_SIZE
    assert (driver.config(0, 2), driver.config(2, 2)) == (80, 24)
    generation = driver.generation()
    driver.ack()
    fcntl.ioctl(terminal[1], termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    assert wait_for(lambda: driver.interrupt_status() & 2, 3)
    assert (driver.config(0, 2), driver.config(2, 2)) == (132, 50)
    assert driver.generation() != generation


def test_escape_key_asks_the_machine(console: Console, terminal: tuple[int, int]) -> None:
    device = console(hostdev="terminal")
    os.write(terminal[0], b"\x01p\x01x")
    assert wait_for(lambda: device.ctx.shutdowns)
    assert device.ctx.button_presses == 1
    assert device.ctx.shutdowns == [("the escape key cut the power", 3)]


def test_escape_none_gives_the_guest_every_key(console: Console, terminal: tuple[int, int]) -> None:
    device = console(escape="none")
    os.write(terminal[0], b"\x01x")
    assert wait_for(lambda: device.vdev.status()["waiting_input"] == 2)
    assert not device.ctx.shutdowns


def test_the_terminal_is_restored_by_the_end(console: Console, terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    device = console()
    assert termios.tcgetattr(terminal[1]) != before
    assert {result.verdict for result in device.terminate()} == {"ok"}
    assert termios.tcgetattr(terminal[1]) == before


def test_the_terminal_is_restored_when_the_start_fails_later(
    tmp_path: Path, terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = termios.tcgetattr(terminal[1])
    raw = []

    def on_starting(self: VirtioConsole) -> None:
        raw.append(termios.tcgetattr(terminal[1]) != before)
        raise HostError("another vdev refuses")

    monkeypatch.setattr(VirtioConsole, "on_starting", on_starting)
    with pytest.raises(HostError, match="refuses"):
        plug(VirtioConsole, base_dir=tmp_path)
    assert raw == [True]
    assert termios.tcgetattr(terminal[1]) == before


def test_the_end_writes_out_what_is_buffered(
    client: tuple[Plugged[VirtioConsole], MmioDriver, socket.socket],
) -> None:
    device, driver, far = client
    ring = driver.queues[TX]
    requests = [ring.submit([bytes(10_000)]) for _ in range(40)]
    device.settle()
    ring.reap()
    printed = 10_000 * sum(request.done for request in requests)
    assert printed < 400_000, "something is still buffered"
    received = bytearray()

    def read_late() -> None:
        while part := far.recv(1 << 16):
            received.extend(part)

    reader = threading.Timer(0.2, read_late)
    reader.start()
    assert {result.verdict for result in device.terminate()} == {"ok"}
    reader.join(5)
    assert len(received) >= printed
    far.close()


def test_status_is_json(console: Console) -> None:
    json.dumps(dict(console(hostdev="null").vdev.status()))


def test_options_refuse_a_malformed_hostdev() -> None:
    with pytest.raises(ValueError, match="hostdev"):
        ConsoleOptions(hostdev="unix:")
