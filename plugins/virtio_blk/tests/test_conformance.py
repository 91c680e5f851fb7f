"""The contracts every virtio vdev keeps, applied to the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
