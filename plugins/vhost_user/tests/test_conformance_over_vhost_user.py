"""The contracts every virtio vdev keeps, with a vhost-user session in the place of a bus.

What cannot be asked here: the registers of a window (there is none), and features beyond bit 63, which no
message can carry; the driver then behaves as a VMM does that cannot pass them on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from behind_kit import BehindVhostUser, open_descriptors
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IN, OK, OUT, header
from qvm_virtio_console.device import VirtioConsole
from qvm_virtio_entropy import VirtioEntropy
from qvm_virtio_net import spec as net
from qvm_virtio_net.device import VirtioNet

from qvmcore.testing.conformance import TerminationConformance, VirtioConformance
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged


class OverVhostUser(VirtioConformance, TerminationConformance):
    """The contracts, on this transport only."""

    @pytest.fixture(autouse=True, params=["vhost-user"])
    def transport(self, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
        """And nothing of it is left in the process."""
        gc.collect()
        before = open_descriptors()
        yield request.param
        # An error that was logged is kept by pytest, with its traceback and what that refers to.
        caplog.get_records("call").clear()
        gc.collect()
        assert open_descriptors() == before, "descriptors are left"

    def plugged(self, tmp_path: Path) -> Plugged[Any]:
        """Behind a session."""
        return BehindVhostUser(self.vdev_class, self.make_options(tmp_path), tmp_path)


class TestEntropy(OverVhostUser):
    vdev_class = VirtioEntropy

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([], [32])
        device.settle()
        assert driver.queues[0].reap() == [request]
        assert request.length == 32 and request.result() != bytes(32)


class TestBlk(OverVhostUser):
    vdev_class = VirtioBlk
    disks = 0

    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        self.disks += 1
        path = tmp_path / f"{self.disks}.img"
        path.write_bytes(bytes(65536))
        return {"hostdev": path.name, "queues": 2}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        for ring in driver.queues:
            write = ring.submit([header(OUT, 1), b"z" * 512], [1])
            device.settle()
            assert ring.reap() == [write] and write.result() == bytes([OK])
            read = ring.submit([header(IN, 1)], [512, 1])
            device.settle()
            assert ring.reap() == [read] and read.result() == b"z" * 512 + bytes([OK])


class TestConsole(OverVhostUser):
    vdev_class = VirtioConsole
    options = {"hostdev": ">out", "ports": [{"name": "log", "hostdev": ">log"}]}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[1].submit([b"ping"], [])
        device.settle()
        assert driver.queues[1].reap() == [request]


class TestNet(OverVhostUser):
    vdev_class = VirtioNet
    options = {"none": True}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        frame = driver.queues[1].submit([bytes(12), bytes(60)], [])
        promisc = driver.queues[2].submit([bytes([net.CTRL_RX, net.CTRL_RX_PROMISC]), b"\1"], [1])
        device.settle()
        assert driver.queues[1].reap() == [frame] and frame.length == 0
        if driver.features & net.F_CTRL_VQ:
            assert driver.queues[2].reap() == [promisc] and promisc.result() == net.CTRL_OK
