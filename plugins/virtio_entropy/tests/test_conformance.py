"""The contracts every virtio vdev keeps, applied to virtio-entropy."""

from typing import Any

from qvm_virtio_entropy import VirtioEntropy

from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VirtioConformance
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged


class TestVirtioEntropy(VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = VirtioEntropy

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([], [32])
        device.settle()
        assert driver.queues[0].reap() == [request]
        assert request.length == 32 and request.result() != bytes(32)
