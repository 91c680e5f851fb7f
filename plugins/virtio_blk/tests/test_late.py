"""`delayed`: the disk is opened when the guest's driver starts, and tried again until the time is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_server import Server
from qvm_virtio_blk import late
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import FLUSH, IN, IOERR, OK, Start, header

from qvmcore.api import ConfigError, HostError
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is long."""
    monkeypatch.setattr(late, "RETRY", 0.01)


def wait(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_nothing_is_opened_before_the_driver_comes(disk: Disk, start: Start, image: Path) -> None:
    device = disk(delayed=0)
    other = disk()  # the lock is free still
    other.terminate()
    assert start(device).read(5) == (OK, b"\5" * 512)
    with pytest.raises(HostError, match="is being used by another disk of this VM"):
        disk()


def test_the_driver_s_first_look_finds_the_capacity(disk: Disk) -> None:
    driver = MmioDriver.of(disk(delayed="forever"))
    assert driver.config(0, 8) == 0
    driver.reset()
    driver.negotiate()
    assert driver.config(0, 8) == 128


def test_5_2_6_2_a_disk_that_comes_later_is_a_new_capacity(disk: Disk, start: Start, image: Path) -> None:
    away = image.rename(image.with_name("away.img"))
    guest = start(disk(hostdev=str(image), delayed="forever"))
    assert guest.driver.config(0, 8) == 0
    assert guest.io([header(IN)], [512, 1])[0] == IOERR
    assert guest.io([header(FLUSH)], [1])[0] == IOERR
    guest.driver.ack()
    count = guest.device.irq.count
    away.rename(image)
    assert guest.device.irq.wait(count + 1)
    assert guest.driver.interrupt_status() & 2 and guest.driver.config(0, 8) == 128
    assert guest.alive()


def test_0_tries_once(
    disk: Disk, start: Start, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hostdev = tmp_path / "later.img"
    with caplog.at_level(logging.WARNING):
        guest = start(disk(hostdev=str(hostdev), delayed=0))
    assert "the disk stays closed" in caplog.text and "No such file" in caplog.text
    image.rename(hostdev)
    time.sleep(0.05)
    guest.device.settle()
    assert guest.driver.config(0, 8) == 0 and guest.io([header(IN)], [512, 1])[0] == IOERR
    guest.driver.start()
    assert guest.alive(), "a driver that starts anew is a new chance"


def test_seconds_end(disk: Disk, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guest = start(disk(hostdev=str(tmp_path / "never"), delayed=1))
        wait(lambda: "the disk stays closed" in caplog.text)
    assert caplog.text.count("not open yet, trying again") == 1, "the same reason is told once"
    guest.device.settle()
    assert {result.verdict for result in guest.device.terminate()} == {"ok"}


def test_the_end_while_it_is_tried(disk: Disk, start: Start, tmp_path: Path) -> None:
    guest = start(disk(hostdev=str(tmp_path / "never"), delayed="forever"))
    assert {result.verdict for result in guest.device.terminate()} == {"ok"}


def test_a_server_that_comes_later(disk: Disk, start: Start, tmp_path: Path, image: Path) -> None:
    server = Server(tmp_path, image)
    try:
        guest = start(disk(hostdev=server.uri, delayed="forever"))
        assert guest.driver.config(0, 8) == 0
        guest.driver.ack()
        count = guest.device.irq.count
        server.start()
        assert guest.device.irq.wait(count + 1, 20)
        assert guest.driver.config(0, 8) == 128
        request = guest.driver.queues[0].submit([header(IN, 3)], [512, 1])
        wait(lambda: guest.driver.queues[0].reap())
        assert request.result() == b"\3" * 512 + b"\0"
    finally:
        server.kill()


def test_a_server_by_the_name_of_its_host(disk: Disk, start: Start, tmp_path: Path, image: Path) -> None:
    """One name, several addresses: the first may refuse, and the next socket may have its number."""
    server = Server(tmp_path, image)
    try:
        guest = start(disk(hostdev=f"nbd://localhost:{server.start_tcp()}/", delayed="forever"))
        wait(lambda: guest.driver.config(0, 8) == 128)
        server.kill()
        wait(lambda: not guest.device.vdev.status()["connected"])
        assert not guest.device.ctx.faults
    finally:
        server.kill()


@pytest.mark.parametrize("value", [-1, "for ever", 1.5])
def test_what_delayed_may_be(disk: Disk, value: object) -> None:
    with pytest.raises(ConfigError, match="delayed"):
        disk(delayed=value)
