"""The contracts every virtio vdev keeps, applied to the card."""

from __future__ import annotations

from typing import Any

from qvm_virtio_net import spec
from qvm_virtio_net.device import VirtioNet

from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VirtioConformance
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged
from qvmcore.testing.pci import PciConformance


def check(device: Plugged[Any], driver: VirtioDriver) -> None:
    """A frame is taken, and a command is answered if there is a control queue."""
    frame = driver.queues[1].submit([bytes(12), bytes(60)], [])
    promisc = driver.queues[2].submit([bytes([spec.CTRL_RX, spec.CTRL_RX_PROMISC]), b"\1"], [1])
    device.settle()
    assert driver.queues[1].reap() == [frame] and frame.length == 0
    if driver.features & spec.F_CTRL_VQ:
        assert driver.queues[2].reap() == [promisc] and promisc.result() == spec.CTRL_OK


class TestVirtioNet(VirtioConformance, MmioConformance, PciConformance, TerminationConformance):
    vdev_class = VirtioNet
    options = {"none": True}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        check(device, driver)
