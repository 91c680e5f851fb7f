"""virtio-entropy as a driver sees it, and what a hostile one may do (virtio 1.4, 5.4)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_entropy import VirtioEntropy

from qvmcore.api import HostError
from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.driver import MmioDriver, VirtioDriver
from qvmcore.testing.fakes import Plugged, plug

Plug = Callable[..., Plugged[VirtioEntropy]]


def _started(device: Plugged[VirtioEntropy]) -> MmioDriver:
    driver = MmioDriver.of(device)
    driver.start()
    return driver


def test_5_4_6_buffers_get_different_bytes(qvm_plug: Plug) -> None:
    device = qvm_plug(VirtioEntropy)
    driver = _started(device)
    requests = [driver.queues[0].submit([], [64]) for _ in range(3)]
    device.settle()
    driver.queues[0].reap()
    assert [request.length for request in requests] == [64, 64, 64]
    assert len({request.result() for request in requests}) == 3


def test_5_4_6_a_request_gets_at_most_max_bytes_and_at_least_one(qvm_plug: Plug) -> None:
    device = qvm_plug(VirtioEntropy, max_bytes=100)
    driver = _started(device)
    request = driver.queues[0].submit([], [60, 60])
    device.settle()
    driver.queues[0].reap()
    assert request.length == 100 and request.result()[100:] == bytes(20)


def test_5_4_6_a_buffer_without_room_comes_back_empty(qvm_plug: Plug) -> None:
    device = qvm_plug(VirtioEntropy)
    driver = _started(device)
    request = driver.queues[0].submit([b"readable only"], [])
    device.settle()
    driver.queues[0].reap()
    assert request.length == 0 and not driver.needs_reset


def test_a_source_without_bytes_makes_only_the_guest_wait(qvm_plug: Plug, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "source")
    writer = os.open(tmp_path / "source", os.O_RDWR)
    try:
        device = qvm_plug(VirtioEntropy, source=str(tmp_path / "source"))
        driver = _started(device)
        first = driver.queues[0].submit([], [8])
        device.settle()
        driver.queues[0].reap()
        assert not first.done
        driver.reset()
        driver = _started(device)
        second = driver.queues[0].submit([], [8])
        device.settle()
        os.write(writer, b"12345678")
        assert device.irq.wait(1)
        driver.queues[0].reap()
        assert second.result() == b"12345678"
    finally:
        os.close(writer)


def test_a_source_that_ended_is_not_read_again(qvm_plug: Plug, tmp_path: Path) -> None:
    (tmp_path / "seed").write_bytes(b"once")
    device = qvm_plug(VirtioEntropy, source=str(tmp_path / "seed"))
    driver = _started(device)
    first, second = (driver.queues[0].submit([], [4]) for _ in range(2))
    device.settle()
    driver.queues[0].reap()
    assert first.result() == b"once" and not second.done
    assert "has ended" in str(device.ctx.faults[0])


def test_a_source_that_is_not_there_refuses_the_start(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot open .*missing: No such file"):
        plug(VirtioEntropy, source=str(tmp_path / "missing"))


class HostileGuest(VirtioAbuse):
    """Anything at all, over the registers and the ring."""

    def device(self) -> Plugged[Any]:
        return plug(VirtioEntropy)

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([], [32])
        device.settle()
        driver.queues[0].reap()
        assert request.length == 32


TestHostileGuest = HostileGuest.TestCase
