"""The contracts of vdevs, kept while every access of the guest is a message of a vfio-user client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from over_vfio_user import OverVfioUser, VfioUserDriven, plug_over_vfio_user

from qvmcore.pci.vdev import BarWindow, PciVdev
from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.conformance import (
    MmioConformance,
    TerminationConformance,
    VdevConformance,
    VirtioConformance,
)
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.fakes import Plugged
from qvmcore.testing.pci import PciConformance
from qvmcore.testing.pci_driver import PciDriver
from qvmcore.testing.samples import Echo
from qvmcore.types import PciId, Window

hello = pytest.importorskip("qvm_hello", reason="the example vdev is not installed")
dummy = pytest.importorskip("qvm_pci_dummy", reason="pci-dummy is not installed")
blk = pytest.importorskip("qvm_virtio_blk.device", reason="virtio-blk is not installed")
blk_testing = pytest.importorskip("qvm_virtio_blk.testing", reason="virtio-blk is not installed")
console = pytest.importorskip("qvm_virtio_console.device", reason="virtio-console is not installed")
entropy = pytest.importorskip("qvm_virtio_entropy", reason="virtio-entropy is not installed")
net = pytest.importorskip("qvm_virtio_net.device", reason="virtio-net is not installed")


class Counter(PciVdev):
    """A PCI device of its own: a wide BAR that counts what is written, and a small one; two lines."""

    vdev_type = "counter"
    summary = "counts"
    pci_id = PciId(0x1C05, 0x0042)
    pci_class = 0xFF0000
    windows = (BarWindow(0x4000, access=frozenset({4, 8}), wide=True), Window(0x1000, access=frozenset({4})))
    irqs = 2
    total = 0
    private = 0

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return self.total & (1 << 8 * size) - 1 if offset == 0 else window

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.total += value
            self.ctx.irq(window).pulse()

    def on_reset(self) -> None:
        self.total = 0


class TestHello(VfioUserDriven, VdevConformance, MmioConformance, PciConformance, TerminationConformance):
    vdev_class = hello.Hello


class TestPciDummy(VfioUserDriven, VdevConformance, PciConformance, TerminationConformance):
    vdev_class = dummy.PciDummy
    options = {"vendor": 0x1234, "reg": ["0x40/4=0x12345678"]}


class TestCounter(VfioUserDriven, VdevConformance, MmioConformance, PciConformance, TerminationConformance):
    vdev_class = Counter


class TestEcho(VfioUserDriven, VirtioConformance, MmioConformance, PciConformance, TerminationConformance):
    vdev_class = Echo

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([b"ping"], [8])
        device.settle()
        assert driver.queues[0].reap() == [request]
        assert request.result() == b"ping\0\0\0\0"

    def test_4_1_5_1_2_every_vector_reaches_its_eventfd(
        self, device: Plugged[Any], driver: VirtioDriver
    ) -> None:
        """MSI-X as QEMU sets it up: the table stays with the client, eventfds are passed."""
        assert isinstance(device, OverVfioUser) and isinstance(driver, PciDriver)
        assert device.remote is not None
        driver.use_msix(0xFEE0_0000)
        driver.reset()
        driver.negotiate()
        assert [driver.map_config(2), driver.map_queue(0, 0), driver.map_queue(1, 1)] == [2, 0, 1]
        driver.setup_queues()
        driver.driver_ok()
        for count, index in enumerate((1, 0), 1):
            driver.queues[index].submit([b"x"], [1])
            assert device.irq.wait(count)
        device.vdev.value += 1
        device.vdev.virtio.config_changed()
        assert device.irq.wait(3)
        assert device.remote.vectors == [1, 0, 2]
        driver.disable_msix()
        for index, ring in enumerate(driver.queues):
            ring.reap()
            ring.submit([b"y"], [1])
            device.settle()
            assert ring.used_idx == 2, index
        assert device.remote.vectors == [1, 0, 2]


class TestPosted(TestEcho):
    """Stores to BARs that nobody waits for, as in QEMU."""

    posted = True

    test_reset_is_idempotent = None  # it resets the vdev behind the client's back, before the stores arrive


class TestVirtioBlk(VfioUserDriven, VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = blk.VirtioBlk
    disks = 0

    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        self.disks += 1
        path = tmp_path / f"{self.disks}.img"
        path.write_bytes(bytes(65536))
        return {"hostdev": path.name}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([blk_testing.header(blk_testing.IN, 1)], [512, 1])
        device.settle()
        assert driver.queues[0].reap() == [request]
        assert request.result()[-1] == blk_testing.OK


class TestVirtioConsole(VfioUserDriven, VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = console.VirtioConsole
    options = {"hostdev": ">out"}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[1].submit([b"ping"], [])
        device.settle()
        assert driver.queues[1].reap() == [request]


class TestVirtioEntropy(VfioUserDriven, VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = entropy.VirtioEntropy

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([], [32])
        device.settle()
        assert driver.queues[0].reap() == [request]
        assert request.length == 32 and request.result() != bytes(32)


class TestVirtioNet(VfioUserDriven, VirtioConformance, MmioConformance, TerminationConformance):
    vdev_class = net.VirtioNet
    options = {"none": True}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        frame = driver.queues[1].submit([bytes(12), bytes(60)], [])
        device.settle()
        assert driver.queues[1].reap() == [frame] and frame.length == 0


class HostileGuest(VirtioAbuse):
    """A guest with a hostile driver, in a VMM that knows its protocol."""

    examples = 10

    def device(self) -> Plugged[Any]:
        return plug_over_vfio_user(Echo, {}, Path())

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([b"ping"], [4])
        device.settle()
        driver.queues[0].reap()
        assert request.result() == b"ping"


TestHostileGuest = HostileGuest.TestCase
