"""The contracts of vdevs, kept while a vCPU of each engine makes every register access."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qvmcore.plugins import PluginHost
from qvmcore.testing.conformance import (
    MmioConformance,
    TerminationConformance,
    VdevConformance,
    VirtioConformance,
)
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.engine_driven import DrivenPlugged, EngineDriven
from qvmcore.testing.fakes import Plugged
from qvmcore.testing.guest_archs import X86_64, Aarch64, GuestArch
from qvmcore.testing.pci import PciConformance
from qvmcore.testing.samples import Echo

hello = pytest.importorskip("qvm_hello", reason="the example vdev is not installed")
blk = pytest.importorskip("qvm_virtio_blk.device", reason="virtio-blk is not installed")
blk_testing = pytest.importorskip("qvm_virtio_blk.testing", reason="virtio-blk is not installed")
console = pytest.importorskip("qvm_virtio_console.device", reason="virtio-console is not installed")
net = pytest.importorskip("qvm_virtio_net.device", reason="virtio-net is not installed")


ENGINES: dict[str, tuple[GuestArch, int]] = {"emulated": (Aarch64(), 4), "kvm": (X86_64(), 8)}


class OnEngines(EngineDriven):
    """Once on each engine that is installed and can run here."""

    @pytest.fixture(autouse=True, params=ENGINES)
    def _usable(self, request: pytest.FixtureRequest) -> None:
        host = PluginHost()
        if request.param not in host.engine_names():
            pytest.skip(f"no engine {request.param} is installed")
        self.engine = host.engine(request.param)
        self.arch, self.widest = ENGINES[request.param]
        self.skip_unless_usable()


class TestHello(OnEngines, VdevConformance, MmioConformance, TerminationConformance):
    vdev_class = hello.Hello


class TestEcho(OnEngines, VirtioConformance, MmioConformance, PciConformance, TerminationConformance):
    vdev_class = Echo

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([b"ping"], [8])
        device.settle()
        assert driver.queues[0].reap() == [request]
        assert request.result() == b"ping\0\0\0\0"


class TestVirtioBlk(OnEngines, VirtioConformance, TerminationConformance):
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

    def test_a_request_costs_no_exit_to_python(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        """One notification each, and the only exits are those of the program asking for its next order."""
        assert isinstance(device, DrivenPlugged)
        driver.start(driver.acceptable() & ~(1 << 38))  # NOTIFICATION_DATA has no fixed value to match
        device.settle()
        guest = device.server.guest
        if not guest.fast_doorbells:
            pytest.skip(f"the engine {self.engine.name} has no fast doorbells")
        before: Any = guest.status()
        for _ in range(100):
            self.check_works(device, driver)
        after: Any = guest.status()
        notifications = sum(ring.notifications for ring in driver.queues)
        assert notifications == 100
        assert after["exits"]["mmio"] - before["exits"]["mmio"] == notifications  # the mailbox's
        assert after["doorbells"] >= len(driver.queues)


class TestVirtioConsole(OnEngines, VirtioConformance, TerminationConformance):
    vdev_class = console.VirtioConsole
    options = {"hostdev": ">out"}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[1].submit([b"ping"], [])
        device.settle()
        assert driver.queues[1].reap() == [request]


class TestVirtioNet(OnEngines, VirtioConformance, TerminationConformance):
    vdev_class = net.VirtioNet
    options = {"none": True}

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        frame = driver.queues[1].submit([bytes(12), bytes(60)], [])
        device.settle()
        assert driver.queues[1].reap() == [frame] and frame.length == 0
