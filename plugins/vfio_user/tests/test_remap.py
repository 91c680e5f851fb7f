"""Memory goes and comes back while a virtio device runs its queues: firmware makes QEMU do that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from over_vfio_user import OverVfioUser, plug_over_vfio_user
from qvm_vfio_user.testing import UNMAP_ALL

from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.samples import Echo
from qvmcore.virtio import spec


@pytest.fixture
def device() -> Iterator[OverVfioUser]:
    with plug_over_vfio_user(Echo, {}, Path(), posted=True) as each:
        yield each  # type: ignore[misc]
        assert each.ctx.faults == []


@pytest.fixture(params=["split", "packed"])
def driver(device: OverVfioUser, request: pytest.FixtureRequest) -> VirtioDriver:
    each = device.driver()
    each.packed = request.param == "packed"
    each.start()
    return each


def works(device: OverVfioUser, driver: VirtioDriver) -> None:
    """A request is answered."""
    request = driver.queues[0].submit([b"ping"], [4])
    device.settle()
    assert driver.queues[0].reap() == [request] and request.result() == b"ping"


def test_DMA_UNMAP_of_all_and_DMA_MAP_in_pieces_leave_the_queues_running(
    device: OverVfioUser, driver: VirtioDriver
) -> None:
    (ram,) = device.memory.regions
    # The pieces end on either side of the rings, and one of them is read-only.
    first, hole = driver.queues[0].desc & ~0xFFF, ram.end - 0x10000
    for _ in range(3):
        works(device, driver)
        device.client.dma_unmap(ram.start, ram.size)
        for start, end, flags in ((ram.start, first, 3), (hole, ram.end, 1), (first, hole, 3)):
            if start < end:
                device.client.dma_map(start, end - start, ram.fd, start - ram.start, flags)
        works(device, driver)
        device.client.dma_unmap(0, 0, UNMAP_ALL)
        device.client.dma_map(ram.start, ram.size, ram.fd)
    assert not device.vdev.virtio.status & spec.DEVICE_NEEDS_RESET


def test_a_request_while_memory_is_away_is_served_when_it_is_back(
    device: OverVfioUser, driver: VirtioDriver
) -> None:
    (ram,) = device.memory.regions
    device.client.dma_unmap(ram.start, ram.size)
    request = driver.queues[0].submit([b"ping"], [4])
    device.settle()
    assert driver.queues[0].reap() == [] and device.served.memory.regions == ()
    device.client.dma_map(ram.start, ram.size, ram.fd)
    device.settle()
    assert driver.queues[0].reap() == [request] and request.result() == b"ping"


def test_DEVICE_RESET_while_memory_is_away_is_a_reset(device: OverVfioUser, driver: VirtioDriver) -> None:
    (ram,) = device.memory.regions
    device.client.dma_unmap(ram.start, ram.size)
    device.client.reset()
    assert device.vdev.virtio.status == 0
    device.client.dma_map(ram.start, ram.size, ram.fd)
    assert device.device is not None
    device.device.enumerate()
    driver.start()
    works(device, driver)


def test_leaving_while_memory_is_away_ends_the_device_in_order(
    device: OverVfioUser, driver: VirtioDriver
) -> None:
    (ram,) = device.memory.regions
    device.client.dma_unmap(ram.start, ram.size)
    assert all(step.verdict == "ok" for step in device.terminate()), "the plan"
