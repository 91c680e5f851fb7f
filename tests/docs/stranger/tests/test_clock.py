import time
from typing import Any

from qvm_clock import ANSWER, OK, READ, REQUEST, Clock

from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VirtioConformance
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.pci import PciConformance


class TestClock(VirtioConformance, MmioConformance, PciConformance, TerminationConformance):
    vdev_class = Clock
    options = {"offset": 3600}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([REQUEST.pack(READ, 0)], [ANSWER.size])
        device.settle()
        assert driver.queues[0].reap() == [request]
        status, now = ANSWER.unpack(request.result())
        assert status == OK and 3590 < now / 1e9 - time.time() < 3610


class HostileGuest(VirtioAbuse):
    def device(self) -> Plugged[Any]:
        return plug(Clock)


TestHostileGuest = HostileGuest.TestCase
