"""The contracts every virtio vdev keeps, applied to the console."""

from __future__ import annotations

from typing import Any

from qvm_virtio_console.device import VirtioConsole

from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VirtioConformance
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged


class TestVirtioConsole(VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = VirtioConsole
    options = {"hostdev": ">out"}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[1].submit([b"ping"], [])
        device.settle()
        assert driver.queues[1].reap() == [request]
        assert request.length == 0


class TestMultiport(TestVirtioConsole):
    options = {"hostdev": ">out", "ports": [{"name": "log", "hostdev": ">log"}]}
