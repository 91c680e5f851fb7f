"""The kit certifies its own sample: what a plugin's test file looks like."""

from __future__ import annotations

from typing import Any

from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VirtioConformance
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.pci import PciConformance
from qvmcore.testing.samples import Echo


def echo_once(device: Plugged[Any], driver: VirtioDriver) -> None:
    """One request there and back."""
    request = driver.queues[0].submit([b"ping"], [8])
    device.settle()
    assert driver.queues[0].reap() == [request]
    assert request.result() == b"ping\0\0\0\0"


class TestEcho(VirtioConformance, MmioConformance, PciConformance, TerminationConformance):
    """The contracts."""

    vdev_class = Echo

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        echo_once(device, driver)


class HostileGuest(VirtioAbuse):
    """Arbitrary registers, rings and resets."""

    examples = 60

    def device(self) -> Plugged[Echo]:
        return plug(Echo)

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        echo_once(device, driver)


TestHostileGuest = HostileGuest.TestCase
