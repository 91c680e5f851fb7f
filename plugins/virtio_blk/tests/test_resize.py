"""The image changes its size under the running guest (virtio 1.4, 5.2.6.2 and 2.5)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from qvm_virtio_blk import device as device_module
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import DISCARD, IN, IOERR, OK, OUT, WRITE_ZEROES, Guest, Start, header, segment

from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]
CONFIG_INTERRUPT = 2


def test_5_2_6_2_grown_and_told_without_a_request(
    disk: Disk, start: Start, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "SIZE_PERIOD", 0.01)
    guest = start(disk())
    guest.device.settle()
    guest.driver.ack()
    count, generation = guest.device.irq.count, guest.driver.generation()
    os.truncate(image, 256 * 512)
    assert guest.device.irq.wait(count + 1)
    assert guest.driver.interrupt_status() & CONFIG_INTERRUPT
    assert guest.driver.config(0, 8) == 256 and guest.driver.generation() != generation
    assert guest.write(255, b"n" * 512) == OK
    assert guest.read(255) == (OK, b"n" * 512)


def test_5_2_6_2_shrunk_under_the_guest(guest: Guest, image: Path) -> None:
    os.truncate(image, 64 * 512)
    assert guest.write(100, b"x" * 512) == IOERR
    assert image.stat().st_size == 64 * 512, "a write behind the new end does not grow the image again"
    assert guest.driver.config(0, 8) == 64
    assert guest.read(64)[0] == IOERR
    for kind in (DISCARD, WRITE_ZEROES):
        assert guest.ranges(kind, segment(60, 8)) == IOERR
    assert guest.read(63) == (OK, bytes([63]) * 512)
    assert image.stat().st_size == 64 * 512


def test_requests_in_the_ring_when_the_image_shrinks(guest: Guest, image: Path) -> None:
    queue = guest.driver.queues[0]
    requests = [queue.add([header(IN, n)], [512, 1]) for n in range(0, 128, 2)]
    requests += [queue.add([header(OUT, 126), b"x" * 512], [1])]
    os.truncate(image, 64 * 512)
    queue.kick()
    guest.device.settle()
    queue.reap()
    statuses = [request.result()[-1] for request in requests]
    assert statuses == [OK] * 32 + [IOERR] * 33
    assert image.stat().st_size == 64 * 512


def test_emptied_and_filled_again(guest: Guest, image: Path) -> None:
    os.truncate(image, 0)
    assert guest.read(0)[0] == IOERR and guest.driver.config(0, 8) == 0
    os.truncate(image, 8 * 512)
    guest.read(0)  # behind the end that is known; the disk is looked at once it is answered
    assert guest.alive() and guest.driver.config(0, 8) == 8


def test_a_partial_block_does_not_count(disk: Disk, start: Start, image: Path) -> None:
    guest = start(disk(block_size="4K"))
    os.truncate(image, 100 * 512)
    assert guest.write(0, bytes(4096)) == OK and guest.driver.config(0, 8) == 96
    assert guest.read(96)[0] == IOERR


def test_the_same_size_is_no_news(guest: Guest, image: Path) -> None:
    generation = guest.driver.generation()
    data = image.read_bytes()
    with image.open("r+b") as file:  # written over, never emptied: the device looks every second
        file.write(data)
    assert guest.write(0, b"n" * 512) == OK and guest.driver.generation() == generation
