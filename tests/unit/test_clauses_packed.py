"""Clauses of virtio 1.4 for the packed ring, 2.8, that its other tests do not show."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from qvm_virtio_blk.device import VirtioBlk

from qvmcore.memory import GuestMemory
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam
from qvmcore.testing.samples import Echo
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.packed import PackedQueue, PackedRings
from qvmcore.virtio.queue import Virtqueue

SIZE = 8


@pytest.fixture
def ring() -> tuple[PackedDriver, Virtqueue]:
    """The two ends of one ring."""
    memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 20)])
    driver = PackedDriver(GuestRam(memory), SIZE)
    rings = PackedRings(memory, SIZE, driver.desc, driver.avail, driver.used)
    return driver, PackedQueue(0, rings, memory, 0, lambda: None, lambda error: None, lambda: None)


def test_2_8_12_descriptors_are_taken_in_the_order_of_the_ring(ring: tuple[PackedDriver, Virtqueue]) -> None:
    """Several at once, whatever their IDs, also across the end of the ring."""
    driver, queue = ring
    for batch in range(2 * SIZE):
        texts = [bytes([batch, number]) for number in range(SIZE - 1)]
        requests = [driver.add([text]) for text in texts]
        driver.kick()
        taken = list(queue)
        assert [chain.read() for chain in taken] == texts
        # Given back in another order, so that the IDs the driver takes next are in disorder.
        for chain in taken[batch % SIZE :] + taken[: batch % SIZE]:
            queue.push(chain)
        queue.notify()
        assert sorted(each.head for each in driver.reap()) == sorted(each.head for each in requests)


def test_2_8_15_a_used_descriptor_is_not_changed_any_more(ring: tuple[PackedDriver, Virtqueue]) -> None:
    driver, queue = ring
    for _ in range(SIZE):
        driver.submit([], [4])
    chains = [queue.pop() for _ in range(SIZE)]
    used: list[tuple[int, int, int, int]] = []
    for slot, chain in enumerate(chains):
        assert chain is not None
        chain.write(b"ab")
        queue.push(chain)
        used.append(driver.read_slot(slot))
        assert used[-1][3] & (spec.VIRTQ_DESC_F_AVAIL | spec.VIRTQ_DESC_F_USED) != spec.VIRTQ_DESC_F_AVAIL
        assert [driver.read_slot(number) for number in range(slot + 1)] == used
    queue.notify()
    assert queue.pop() is None
    assert queue.pending == 0
    queue.kill()
    assert [driver.read_slot(number) for number in range(SIZE)] == used


@pytest.fixture(params=["echo", "blk"])
def device(request: pytest.FixtureRequest) -> Iterator[Plugged[Any]]:
    if request.param == "echo":
        device: Plugged[Any] = plug(Echo)
    else:
        device = plug(VirtioBlk, hostdev="memory:1M")
    with device:
        yield device
        assert device.ctx.faults == []


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_2_8_15_readable_buffers_stay_as_they_were(device: Plugged[Any], indirect: bool) -> None:
    driver = MmioDriver.of(device)
    driver.packed = True
    driver.start()
    ring = driver.queues[0]
    assert isinstance(ring, PackedDriver)
    ring.indirect = indirect
    pieces = [struct.pack("<IIQ", 1, 0, 0), b"\xa5" * 512]
    requests = [ring.add(pieces, [1]) for _ in range(3)]
    ring.kick()
    device.settle()
    assert ring.reap() == requests
    for request in requests:
        found = [device.memory.read(piece.address, piece.length) for piece in request.readable]
        assert found == pieces
