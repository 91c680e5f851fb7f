"""A queue served on the vCPU that notified: who serves, and what happens when it goes wrong."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvmcore.errors import GuestError
from qvmcore.slot import VdevSlot
from qvmcore.termination import Phase, TerminationPlan
from qvmcore.testing.driver import MmioDriver, VirtioDriver
from qvmcore.testing.fakes import Plugged, default_transport, plug
from qvmcore.testing.samples import Echo
from qvmcore.types import GuestEnd, MmioHandler, Reason, VdevSpec
from qvmcore.virtio import at_once, life, spec
from qvmcore.virtio.queue import Virtqueue


class QuickEcho(Echo):
    """An Echo that serves at once, unless ``lazy``. ``served`` tells on which threads."""

    vdev_type = "quick-echo"

    def on_configured(self) -> None:
        super().on_configured()
        self.served: list[int] = []
        self.lazy = False
        self.together = self.most = 0

    def serve_now(self, index: int, queue: Virtqueue) -> bool:
        if self.lazy:
            return False
        self.handle_queue(index, queue)
        return True

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        self.together += 1
        self.most = max(self.most, self.together)
        if queue.pending:
            self.served.append(threading.get_ident())
        super().handle_queue(index, queue)
        self.together -= 1


@pytest.fixture(params=["mmio", "pci"])
def echo(request: pytest.FixtureRequest) -> Iterator[Plugged[QuickEcho]]:
    with default_transport(request.param), plug(QuickEcho) as device:
        yield device
        device.vdev.gate.set()


@pytest.fixture
def driver(echo: Plugged[QuickEcho]) -> VirtioDriver:
    driver = echo.driver()
    driver.start()
    echo.settle()
    return driver


def in_background(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def blocked_vcpu(echo: Plugged[QuickEcho], driver: VirtioDriver) -> threading.Thread:
    """A vCPU that sits in serve_now with a chain in its hands."""
    echo.vdev.gate.clear()
    echo.vdev.entered.clear()
    vcpu = in_background(lambda: driver.queues[0].submit([b"slow"], [4]))
    assert echo.vdev.entered.wait(5)
    assert echo.ctx.worker.ident == vcpu.ident
    return vcpu


def test_the_notifying_thread_serves_and_interrupts(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    request = driver.queues[0].submit([b"ping"], [4])
    assert driver.queues[0].reap() == [request]  # without settle(): it was done when notify returned
    assert request.result() == b"ping"
    assert echo.vdev.served == [threading.get_ident()]
    assert echo.irq.count == 1


def test_what_would_wait_is_the_workers(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    echo.vdev.lazy = True
    request = driver.queues[0].submit([b"ping"], [4])
    echo.settle()
    assert driver.queues[0].reap() == [request]
    assert echo.vdev.served == [echo.ctx.worker.ident]


def test_a_device_without_serve_now_has_its_worker() -> None:
    with plug(Echo) as device:
        driver = MmioDriver.of(device)
        driver.start()
        device.settle()
        device.vdev.gate.clear()
        driver.queues[0].submit([b"ping"], [4])
        assert device.vdev.entered.wait(5)
        device.vdev.gate.set()


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_with_doorbells_of_the_engine_nothing_is_served_at_a_call(transport: str) -> None:
    with plug(QuickEcho, transport=transport, fast_doorbells=True) as device:
        driver = device.driver()
        driver.start()
        device.settle()
        driver.queues[0].submit([b"ping"], [4])
        device.settle()
        assert device.vdev.served == [device.ctx.worker.ident]


def test_a_busy_worker_is_not_disturbed(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    here, go = threading.Event(), threading.Event()

    def work() -> None:
        here.set()
        go.wait(10)

    echo.ctx.worker.call(work)
    assert here.wait(5)
    request = driver.queues[0].submit([b"ping"], [4])
    assert driver.queues[0].reap() == []
    go.set()
    echo.settle()
    assert driver.queues[0].reap() == [request]
    assert echo.vdev.served == [echo.ctx.worker.ident]


def test_the_worker_waits_for_the_vcpu(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    vcpu = blocked_vcpu(echo, driver)
    called = threading.Event()
    echo.ctx.worker.call(called.set)
    echo.vdev.virtio.kick(0)
    assert not called.wait(0.1)
    echo.vdev.gate.set()
    vcpu.join(5)
    assert called.wait(5)
    echo.settle()
    assert echo.vdev.most == 1


def test_worker_and_vcpus_never_serve_together(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    """Notifications of two vCPUs and kicks of the host, against each other."""
    stop = threading.Event()

    def ring() -> None:
        while not stop.is_set():
            echo.vdev.virtio.notify_queue(0)

    def kick() -> None:
        while not stop.is_set():
            echo.vdev.virtio.kick(0)
            echo.vdev.virtio.kick(1)

    threads = [in_background(work) for work in (ring, ring, kick)]
    for number in range(300):
        mark = driver.ram.mark()
        request = driver.queues[0].submit([bytes([number & 255])], [1])
        for _ in range(500):
            if request.done or driver.queues[0].reap():
                break
            time.sleep(0.01)
        assert request.result() == bytes([number & 255])
        driver.ram.release(mark)
    stop.set()
    for thread in threads:
        thread.join(5)
    assert echo.vdev.most == 1
    assert echo.ctx.faults == []


def test_a_long_queue_is_handed_over(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    ring = driver.queues[0]
    requests = [ring.add([b"x"], [1]) for _ in range(at_once.CHAINS + 5)]
    ring.kick()
    echo.settle()
    assert ring.reap() == requests
    assert echo.vdev.served == [threading.get_ident(), echo.ctx.worker.ident]


def test_who_kept_the_vcpu_waiting_is_left_to_the_worker(
    echo: Plugged[QuickEcho], driver: VirtioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_once, "PATIENCE", -1.0)
    monkeypatch.setattr(at_once, "REST", 1e9)
    for _ in range(2):
        driver.queues[0].submit([b"ping"], [4])
        echo.settle()
    assert echo.vdev.served == [threading.get_ident(), echo.ctx.worker.ident]


def test_and_gets_the_vcpu_back_later(
    echo: Plugged[QuickEcho], driver: VirtioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_once, "PATIENCE", -1.0)
    monkeypatch.setattr(at_once, "REST", 0.0)
    for _ in range(2):
        driver.queues[0].submit([b"ping"], [4])
        echo.settle()
    assert echo.vdev.served == [threading.get_ident()] * 2


def test_an_exception_is_the_devices_fault(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    echo.vdev.serve_now = _broken  # type: ignore[method-assign]
    driver.start()
    echo.settle()
    driver.queues[0].submit([b"ping"], [4])
    assert [str(fault) for fault in echo.ctx.faults] == ["broken"]
    assert echo.ctx.worker.visit(lambda: True), "the turn was given back"


def _broken(index: int, queue: Virtqueue) -> bool:
    raise RuntimeError("broken")


def test_a_mistake_of_the_guest_needs_a_reset(echo: Plugged[QuickEcho], driver: VirtioDriver) -> None:
    def refuse(index: int, queue: Virtqueue) -> bool:
        raise GuestError("nonsense")

    echo.vdev.serve_now = refuse  # type: ignore[method-assign]
    driver.start()
    echo.settle()
    driver.queues[0].submit([b"ping"], [4])
    assert driver.needs_reset
    assert echo.ctx.faults == []


def test_2_4_1_reset_waits_for_a_busy_vcpu_and_its_push_is_dropped(
    echo: Plugged[QuickEcho], driver: VirtioDriver
) -> None:
    vcpu = blocked_vcpu(echo, driver)
    ring = driver.queues[0]
    other = in_background(driver.reset)
    time.sleep(0.1)
    assert other.is_alive()
    assert echo.vdev.lives == ["active"]
    echo.vdev.gate.set()
    other.join(5)
    vcpu.join(5)
    assert driver.status == 0
    assert echo.vdev.lives == ["active", "inactive"]
    assert ring.used_idx == 0
    assert echo.ctx.faults == []


def test_2_4_1_with_a_vcpu_that_hangs_the_reset_never_completes(
    echo: Plugged[QuickEcho], driver: VirtioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "QUIESCE_TIMEOUT", 0.1)
    vcpu = blocked_vcpu(echo, driver)
    ring = driver.queues[0]
    echo.vdev.virtio.write_status(0)
    assert [str(fault) for fault in echo.ctx.faults] == ["the device did not stop within 0.1 s of its reset"]
    assert echo.vdev.virtio.status & spec.FAILED
    echo.vdev.gate.set()
    vcpu.join(5)
    assert ring.used_idx == 0
    assert echo.vdev.lives == ["active"]


def test_the_end_tells_of_a_vcpu_that_may_still_use_memory(
    echo: Plugged[QuickEcho], driver: VirtioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "QUIESCE_TIMEOUT", 0.1)
    vcpu = blocked_vcpu(echo, driver)
    # A device that failed has no worker any more; whoever serves may still be there.
    echo.ctx.worker.stop(0)
    (stop_dma,) = [step for step in echo.ctx.plan.callbacks if step.phase is Phase.STOP_DMA]
    with pytest.raises(Exception, match="may use guest memory"):
        stop_dma.run(GuestEnd(Reason.GUEST_SHUTDOWN))
    assert not echo.ctx.stop_worker(0.1)
    echo.vdev.gate.set()
    vcpu.join(5)
    assert echo.ctx.stop_worker()
    driver.notify(0)
    assert len(echo.vdev.served) == 1


class Endless(QuickEcho):
    """Does not come back from a notification, with a chain in its hands."""

    vdev_type = "endless"

    def serve_now(self, index: int, queue: Virtqueue) -> bool:
        for chain in queue:
            try:
                self.hang()
            finally:
                queue.unpop(chain)
        return True

    def hang(self) -> None:
        while True:
            time.sleep(0.005)


class Blocked(Endless):
    """Comes back late: nothing can interrupt a system call."""

    vdev_type = "blocked"

    def hang(self) -> None:
        select.select([], [], [], 0.5)


@pytest.mark.parametrize("kind", [Endless, Blocked])
def test_a_hang_is_interrupted_and_the_queue_left_to_the_worker(
    kind: type[Endless], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qvmcore.slot.HANDLER_PATIENCE", 0.05)
    with plug(kind) as device:
        slot = VdevSlot(_spec(tmp_path), Endless, TerminationPlan(), _nothing, _nothing)
        slot.adopt(device.vdev)
        driver = MmioDriver.of(device)
        driver.start()
        device.settle()
        guarded = slot.guard(MmioHandler(device.read, lambda offset, size, value: _notify(device)))
        first = driver.queues[0].add([b"ping"], [4])
        driver.queues[0].publish()
        vcpu = in_background(lambda: guarded.write(0, 4, 0))
        deadline = time.monotonic() + 10
        while vcpu.is_alive() and time.monotonic() < deadline:
            slot.interrupt_if_hung()
            vcpu.join(0.05)
        assert not vcpu.is_alive()
        second = driver.queues[0].submit([b"pong"], [4])
        device.settle()
        assert driver.queues[0].reap() == [first, second]
        assert [first.result(), second.result()] == [b"ping", b"pong"]
        assert slot.faulted == ""
        assert device.ctx.faults == []
        assert set(device.vdev.served) == {device.ctx.worker.ident}
        assert "a register handler runs for" in caplog.text


def _notify(device: Plugged[Endless]) -> None:
    device.vdev.virtio.notify_queue(0)


def _nothing(*_: object) -> None:
    pass


def _spec(tmp_path: Path) -> VdevSpec:
    return VdevSpec(type="endless", name="endless", options=None, base_dir=tmp_path)
