"""The contracts every virtio vdev keeps, applied to the disk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from nbd_server import Server
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IN, OK, header

from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VirtioConformance
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged


class TestVirtioBlk(VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = VirtioBlk
    disks = 0

    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        self.disks += 1
        path = tmp_path / f"{self.disks}.img"
        path.write_bytes(bytes(65536))
        return {"hostdev": path.name}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([header(IN, 1)], [512, 1])
        device.settle()
        assert driver.queues[0].reap() == [request]
        assert request.result()[-1] == OK


class TestSeveralQueuesOpenedLate(TestVirtioBlk):
    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        return {**super().make_options(tmp_path), "queues": 3, "delayed": 0, "dio": "enable"}


class TestOnAServer(VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = VirtioBlk

    @pytest.fixture(autouse=True)
    def server(self, tmp_path: Path) -> Iterator[None]:
        (tmp_path / "disk.img").write_bytes(bytes(65536))
        self.running = Server(tmp_path, tmp_path / "disk.img").start()
        yield
        self.running.kill()

    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        return {"hostdev": f"nbd+unix:///?socket={self.running.socket}"}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([header(IN, 1)], [512, 1])
        deadline = time.monotonic() + 20
        while not driver.queues[0].reap():
            assert time.monotonic() < deadline, "no answer from the server"
            device.settle()
        assert request.result()[-1] == OK
