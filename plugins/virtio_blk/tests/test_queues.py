"""More than one request queue (virtio 1.4, 5.2.2, VIRTIO_BLK_F_MQ)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from qvm_virtio_blk import spec
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IN, OK, Start, header

from qvmcore.api import ConfigError
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]


def test_5_2_2_every_queue_serves(disk: Disk, start: Start) -> None:
    guest = start(disk(queues=4))
    assert guest.driver.features & spec.F_MQ and guest.driver.config(34, 2) == 4
    assert len(guest.driver.queues) == 4
    requests = [
        (queue, n, queue.add([header(IN, n)], [512, 1]))
        for n in range(60)
        for queue in [guest.driver.queues[n % 4]]
    ]
    for queue in guest.driver.queues:
        queue.kick()
    guest.device.settle()
    for queue in guest.driver.queues:
        queue.reap()
    assert all(request.result() == bytes([n]) * 512 + b"\0" for _, n, request in requests)


def test_5_2_2_one_queue_is_no_mq(disk: Disk, start: Start) -> None:
    guest = start(disk())
    assert not guest.driver.features & spec.F_MQ
    assert len(guest.driver.queues) == 1 and guest.driver.config(34, 2) == 1


def test_5_2_2_without_mq_only_the_first_queue_exists(disk: Disk, start: Start) -> None:
    guest = start(disk(queues=2), ~spec.F_MQ)
    late = guest.driver.queues[1].submit([header(IN)], [512, 1])
    assert guest.alive()
    guest.device.settle()
    assert not guest.driver.queues[1].reap() and not late.done and not guest.driver.needs_reset


def test_two_queues_with_the_same_buffers(disk: Disk, start: Start) -> None:
    """Two rings may name the same memory: both are answered."""
    guest = start(disk(queues=2))
    first, second = guest.driver.queues
    request = first.add([header(IN, 5)], [512, 1])
    other = second.add_pieces(request.readable, request.writable)
    first.kick()
    second.kick()
    guest.device.settle()
    first.reap()
    second.reap()
    assert request.done and other.done and request.result() == b"\5" * 512 + bytes([OK])


def test_a_reset_while_all_queues_are_busy(disk: Disk, start: Start) -> None:
    guest = start(disk(queues=3))
    for _ in range(10):
        for queue in guest.driver.queues:
            for _ in range(20):
                queue.add([header(IN, 1)], [512, 1])
            queue.kick()
        guest.driver = MmioDriver.of(guest.device)
        guest.driver.start()
    assert guest.alive()


@pytest.mark.parametrize("queues", [0, 17, -1])
def test_the_number_of_queues_is_bounded(disk: Disk, queues: int) -> None:
    with pytest.raises(ConfigError, match="queues"):
        disk(queues=queues)
