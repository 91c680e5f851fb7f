"""Reset of one queue (VIRTIO_F_RING_RESET, 2.6.1 and 4.2.2) and NOTIFICATION_DATA (2.9), over MMIO."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.samples import Echo
from qvmcore.virtio import life, spec
from qvmcore.virtio.queue import Virtqueue


@pytest.fixture
def echo() -> Iterator[Plugged[Echo]]:
    with plug(Echo) as device:
        yield device
        device.vdev.gate.set()


@pytest.fixture
def driver(echo: Plugged[Echo]) -> MmioDriver:
    driver = MmioDriver.of(echo)
    driver.start()
    echo.settle()
    return driver


def blocked(echo: Plugged[Echo], driver: MmioDriver) -> None:
    """The worker sits inside handle_queue with a chain of queue 0 in its hands."""
    echo.vdev.gate.clear()
    driver.queues[0].submit([b"slow"], [4])
    assert echo.vdev.entered.wait(5)


def roundtrip(device: Plugged[Any], driver: MmioDriver, queue: int = 0) -> None:
    request = driver.queues[queue].submit([b"ping"], [8])
    device.settle()
    assert driver.queues[queue].reap() == [request]
    assert request.result()[:4] == b"ping"


def again(driver: MmioDriver, size: int) -> None:
    """Set queue 0 up again."""
    driver.queues[0] = driver.setup_queue(0, size)


@pytest.mark.parametrize("size", [64, 16, 1])
def test_2_6_1_2_a_reset_queue_works_again_with_any_size(
    echo: Plugged[Echo], driver: MmioDriver, size: int
) -> None:
    for _ in range(3):
        if size > 1:
            roundtrip(echo, driver)
        driver.reset_queue(0)
        assert echo.vdev.virtio.queue(0) is None
        again(driver, size)
        assert driver.read(spec.MMIO_QUEUE_READY) == 1
        assert driver.read(spec.MMIO_QUEUE_RESET) == 0
    driver.queues[0].submit([b"one"])
    echo.settle()
    assert len(driver.queues[0].reap()) == 1
    assert echo.vdev.lives == ["active", *["queue 0 reset"] * 3]


def test_2_6_1_1_the_other_queues_go_on(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.reset_queue(0)
    roundtrip(echo, driver, 1)
    assert driver.status == 15


def test_2_6_1_1_nothing_of_a_reset_queue_is_served_or_notified(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    driver.reset_queue(0)
    ring, count = driver.queues[0], echo.irq.count
    ring.submit([b"late"], [4])
    driver.notify(0)
    echo.vdev.virtio.kick(0)
    echo.settle()
    assert (ring.used_idx, echo.irq.count) == (0, count)


def test_2_6_1_1_everything_the_driver_wrote_is_forgotten(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.reset_queue(0)
    setup = echo.vdev.virtio.setup(0)
    assert setup is not None
    assert (setup.size, setup.desc, setup.driver, setup.device) == (64, 0, 0, 0)


def test_2_6_1_2_a_bad_re_enable_needs_a_reset(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.reset_queue(0)
    driver.place(16, 8, 0, 0)
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    assert driver.needs_reset
    driver.reset_queue(0)
    driver.place(16, driver.ram.alloc(256), driver.ram.alloc(64), driver.ram.alloc(256))
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0, "only a reset of the device mends DEVICE_NEEDS_RESET"
    driver.start()
    roundtrip(echo, driver)


def test_4_2_2_2_parameters_are_locked_until_the_reset(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.write(spec.MMIO_QUEUE_READY, 0)
    driver.place(16, 0x1000, 0x2000, 0x3000)
    setup = echo.vdev.virtio.setup(0)
    assert setup is not None
    assert setup.size == 64
    driver.reset_queue(0)
    driver.place(16, 0x1000, 0x2000, 0x3000)
    assert setup.size == 16


@pytest.mark.parametrize("value", [0, 2, 3, 0xFFFFFFFF])
def test_4_2_2_only_one_resets(echo: Plugged[Echo], driver: MmioDriver, value: int) -> None:
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.write(spec.MMIO_QUEUE_RESET, value)
    assert driver.read(spec.MMIO_QUEUE_READY) == 1
    roundtrip(echo, driver)


@pytest.mark.parametrize("queue", [2, 0xFFFF, 0xFFFFFFFF])
def test_4_2_2_a_queue_that_is_not_there_is_ignored(
    echo: Plugged[Echo], driver: MmioDriver, queue: int
) -> None:
    driver.write(spec.MMIO_QUEUE_SEL, queue)
    driver.write(spec.MMIO_QUEUE_RESET, 1)
    assert driver.read(spec.MMIO_QUEUE_RESET) == 0
    roundtrip(echo, driver)


def test_in_every_other_state_it_is_harmless(echo: Plugged[Echo]) -> None:
    """Before FEATURES_OK, during set-up, doubled, after FAILED, and after the end."""
    driver = MmioDriver.of(echo)

    def write_reset() -> None:
        driver.write(spec.MMIO_QUEUE_SEL, 0)
        driver.write(spec.MMIO_QUEUE_RESET, 1)

    write_reset()
    driver.negotiate()
    write_reset()
    driver.setup_queues()
    write_reset()
    assert driver.read(spec.MMIO_QUEUE_READY) == 0, "reset during set-up"
    driver.driver_ok()
    write_reset()
    write_reset()
    again(driver, 64)
    roundtrip(echo, driver)
    driver.status = 15 | spec.FAILED
    write_reset()
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    driver.start()
    roundtrip(echo, driver)
    echo.terminate()
    write_reset()
    assert echo.ctx.faults == []


def test_2_6_1_1_it_waits_for_a_busy_worker_and_shows_1_meanwhile(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    blocked(echo, driver)
    ring = driver.queues[0]
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    vcpu = threading.Thread(target=lambda: driver.write(spec.MMIO_QUEUE_RESET, 1), daemon=True)
    vcpu.start()
    deadline = time.monotonic() + 5
    while driver.read(spec.MMIO_QUEUE_RESET) == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert driver.read(spec.MMIO_QUEUE_RESET) == 1
    assert echo.vdev.lives == ["active"]
    echo.vdev.gate.set()
    vcpu.join(5)
    assert (driver.read(spec.MMIO_QUEUE_RESET), driver.read(spec.MMIO_QUEUE_READY)) == (0, 0)
    assert (ring.used_idx, echo.irq.count, echo.ctx.faults) == (0, 0, [])
    again(driver, 64)
    roundtrip(echo, driver)


def test_2_6_1_1_with_a_hung_worker_it_never_completes(
    echo: Plugged[Echo], driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "QUIESCE_TIMEOUT", 0.1)
    blocked(echo, driver)
    ring, virtio = driver.queues[0], echo.vdev.virtio
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.write(spec.MMIO_QUEUE_RESET, 1)
    assert len(echo.ctx.faults) == 1
    assert virtio.queue_resetting(0)
    virtio.reset_queue(0)
    virtio.write_queue_ready(0, 1)
    assert virtio.queue_resetting(0)
    assert virtio.queue(0) is None
    echo.vdev.gate.set()
    echo.settle()
    assert ring.used_idx == 0
    assert len(echo.ctx.faults) == 1


# ---- notification data, 2.9 --------------------------------------------------------------------------


class Counting(Echo):
    """Counts how often its worker is woken."""

    wakes = 0

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        self.wakes += 1
        super().handle_queue(index, queue)


def test_2_9_a_notification_of_what_was_taken_already_wakes_nobody() -> None:
    with plug(Counting) as device:
        driver = MmioDriver.of(device)
        driver.start()
        device.settle()
        wakes = device.vdev.wakes
        for _ in range(5):
            driver.notify(0)
            device.settle()
        assert device.vdev.wakes == wakes
        roundtrip(device, driver)
        assert device.vdev.wakes == wakes + 1


@pytest.mark.parametrize("position", [1, 0x7FFF, 0x8000, 0xFFFF])
def test_2_9_a_position_that_is_not_the_devices_own_wakes_it(position: int) -> None:
    with plug(Counting) as device:
        driver = MmioDriver.of(device)
        driver.start()
        device.settle()
        wakes = device.vdev.wakes
        driver.write(spec.MMIO_QUEUE_NOTIFY, position << 16)
        device.settle()
        assert device.vdev.wakes == wakes + 1
        roundtrip(device, driver)


def test_2_9_without_the_feature_the_value_is_a_queue_number() -> None:
    with plug(Counting) as device:
        driver = MmioDriver.of(device)
        driver.start(driver.offered() & ~(1 << spec.VIRTIO_F_NOTIFICATION_DATA))
        device.settle()
        wakes = device.vdev.wakes
        driver.write(spec.MMIO_QUEUE_NOTIFY, 1 << 16)
        device.settle()
        assert device.vdev.wakes == wakes
        driver.notify(0)
        device.settle()
        assert device.vdev.wakes == wakes + 1


def test_2_9_a_queue_that_is_not_there_is_ignored(echo: Plugged[Echo], driver: MmioDriver) -> None:
    for value in (2, 0xFFFF, 0xFFFFFFFF, 0xFFFF0002):
        driver.write(spec.MMIO_QUEUE_NOTIFY, value)
    roundtrip(echo, driver)
