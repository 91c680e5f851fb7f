"""Reset and end while the worker is busy, hung, or in the middle of a service call (2.4)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from qvmcore.termination import Phase
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.samples import Echo
from qvmcore.types import GuestEnd, Reason
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
    """The worker sits inside handle_queue with a chain in its hands."""
    echo.vdev.gate.clear()
    driver.queues[0].submit([b"slow"], [4])
    assert echo.vdev.entered.wait(5)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_2_4_1_reset_waits_for_a_busy_worker_and_its_push_is_dropped(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    blocked(echo, driver)
    ring = driver.queues[0]
    vcpu = in_background(driver.reset)
    time.sleep(0.1)
    assert vcpu.is_alive()
    assert echo.vdev.lives == ["active"]
    echo.vdev.gate.set()
    vcpu.join(5)
    assert driver.status == 0
    assert echo.vdev.lives == ["active", "inactive"]
    assert ring.used_idx == 0
    assert (echo.irq.rises, echo.ctx.faults) == (0, [])
    driver.start()
    request = driver.queues[0].submit([b"fast"], [4])
    echo.settle()
    assert driver.queues[0].reap() == [request]


def test_2_4_1_the_worker_is_idle_while_on_deactivate_runs() -> None:
    class Watchful(Echo):
        ran_during = False

        def on_deactivate(self) -> None:
            ran = threading.Event()
            self.ctx.worker.call(ran.set)
            self.ran_during = ran.wait(0.2)

    with plug(Watchful) as device:
        driver = MmioDriver.of(device)
        driver.start()
        driver.reset()
        assert device.vdev.ran_during is False


def test_2_4_1_a_hung_worker_faults_the_device_and_the_reset_never_completes(
    echo: Plugged[Echo], driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "QUIESCE_TIMEOUT", 0.1)
    blocked(echo, driver)
    ring = driver.queues[0]
    assert driver.status == 15
    started = time.monotonic()
    driver.write(spec.MMIO_STATUS, 0)
    assert time.monotonic() - started < 1
    assert [str(fault) for fault in echo.ctx.faults] == ["the device did not stop within 0.1 s of its reset"]
    virtio = echo.vdev.virtio
    stuck = spec.DEVICE_NEEDS_RESET | spec.FAILED
    assert virtio.status & stuck == stuck
    before = virtio.status
    for _ in range(3):
        virtio.write_status(0)
        virtio.write_status(spec.ACKNOWLEDGE | spec.DRIVER | 0x30)
    assert virtio.status == before
    assert not virtio.active
    echo.vdev.gate.set()
    echo.settle()
    assert ring.used_idx == 0
    assert echo.irq.level is False
    assert echo.vdev.lives == ["active"]
    assert len(echo.ctx.faults) == 1


def test_the_vm_can_end_while_the_worker_hangs(
    echo: Plugged[Echo], driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "QUIESCE_TIMEOUT", 0.1)
    blocked(echo, driver)
    threading.Timer(0.5, echo.vdev.gate.set).start()
    results = {result.phase.name: result for result in echo.terminate()}
    assert results["STOP_DMA"].verdict == "failed"
    assert "may use guest memory" in results["STOP_DMA"].detail
    assert driver.queues[0].used_idx == 0


def test_the_end_quiesces_and_silences_everything(echo: Plugged[Echo], driver: MmioDriver) -> None:
    request = driver.queues[0].submit([b"last"], [4])
    echo.settle()
    driver.queues[0].reap()
    driver.ack()
    assert request.done
    assert {result.verdict for result in echo.terminate()} == {"ok"}
    assert echo.vdev.lives == ["active", "inactive"]
    assert not echo.ctx.worker_alive
    rises = echo.irq.rises
    driver.queues[0].submit([b"late"], [4])
    driver.notify(0)
    echo.vdev.virtio.kick(0)
    echo.vdev.value = 1
    echo.vdev.virtio.config_changed()
    driver.status = 0
    driver.status = spec.ACKNOWLEDGE
    assert echo.irq.rises == rises
    assert driver.queues[0].used_idx == 1
    assert {result.verdict for result in echo.terminate()} == {"ok"}


def test_no_dma_after_the_first_phase_of_the_end(echo: Plugged[Echo], driver: MmioDriver) -> None:
    """The worker still runs then, and a vCPU that did not stop still notifies."""
    (stop_dma,) = [step for step in echo.ctx.plan.callbacks if step.phase is Phase.STOP_DMA]
    stop_dma.run(GuestEnd(Reason.GUEST_SHUTDOWN))
    driver.queues[0].submit([b"late"], [4])
    driver.notify(0)
    echo.settle()
    assert driver.queues[0].used_idx == 0
    assert echo.irq.rises == 0
    assert echo.vdev.lives == ["active", "inactive"]


def test_a_device_cannot_be_brought_up_after_the_end(echo: Plugged[Echo]) -> None:
    driver = MmioDriver.of(echo)
    driver.negotiate()
    driver.setup_queues()
    (stop_dma,) = [step for step in echo.ctx.plan.callbacks if step.phase is Phase.STOP_DMA]
    stop_dma.run(GuestEnd(Reason.GUEST_SHUTDOWN))
    driver.driver_ok()
    assert echo.vdev.lives == []
    assert not echo.vdev.virtio.active


def test_the_worker_comes_back_for_what_a_greedy_driver_left() -> None:
    class Fed(Echo):
        """Every chain served is offered again, 200 times: far more than a queue holds."""

        def handle_queue(self, index: int, queue: Virtqueue) -> None:
            for chain in queue:
                queue.push(chain, 0)
                if self.left:
                    self.left -= 1
                    ring.offer(0)
                    ring.publish()

        left = 200

    with plug(Fed) as device:
        driver = MmioDriver.of(device)
        driver.start()
        ring = driver.queues[0]
        ring.write_desc(0, device.memory.regions[0].start, 4)
        ring.offer(0)
        ring.publish()
        ring.notify()
        for _ in range(5):
            device.settle()
        assert ring.used_idx == 201


def test_services_called_during_a_reset_do_not_deadlock() -> None:
    class Chatty(Echo):
        def handle_queue(self, index: int, queue: Virtqueue) -> None:
            self.entered.set()
            self.gate.wait()
            self.value += 1
            self.virtio.config_changed()
            self.virtio.needs_reset(RuntimeError("given up"))
            self.virtio.kick(0)
            super().handle_queue(index, queue)

    with plug(Chatty) as device:
        device.vdev.gate.clear()
        driver = MmioDriver.of(device)
        driver.start()
        assert device.vdev.entered.wait(5)
        vcpu = in_background(driver.reset)
        time.sleep(0.05)
        device.vdev.gate.set()
        vcpu.join(0.8)
        assert not vcpu.is_alive()
        assert device.ctx.faults == []
        assert driver.status == 0
        assert driver.interrupt_status() == 0


def test_a_reset_from_the_worker_itself_does_not_wait_for_itself(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    echo.ctx.worker.call(echo.vdev.on_reset)
    echo.settle()
    assert driver.status == 0
    assert echo.ctx.faults == []


def test_on_reset_is_idempotent(echo: Plugged[Echo], driver: MmioDriver) -> None:
    for _ in range(3):
        echo.vdev.on_reset()
        assert driver.status == 0
    assert echo.vdev.lives == ["active", "inactive"]


def test_reset_against_kick_never_wedges(echo: Plugged[Echo], driver: MmioDriver) -> None:
    stop = threading.Event()

    def kicker() -> None:
        while not stop.is_set():
            echo.vdev.virtio.notify(0)

    thread = in_background(kicker)
    for number in range(50):
        mark = driver.ram.mark()
        driver.start()
        request = driver.queues[0].submit([bytes([number])], [1])
        echo.settle()
        assert driver.queues[0].reap() == [request]
        driver.reset()
        driver.ram.release(mark)
    stop.set()
    thread.join(5)
    assert echo.ctx.faults == []


def test_4_2_2_1_queue_ready_0_waits_for_the_worker(echo: Plugged[Echo], driver: MmioDriver) -> None:
    blocked(echo, driver)

    def stop_queue() -> None:
        driver.write(spec.MMIO_QUEUE_SEL, 0)
        driver.write(spec.MMIO_QUEUE_READY, 0)

    vcpu = in_background(stop_queue)
    time.sleep(0.1)
    assert vcpu.is_alive()
    echo.vdev.gate.set()
    vcpu.join(5)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    assert driver.queues[0].used_idx == 0
    assert echo.ctx.faults == []
