"""The contracts every vdev keeps, applied to shmem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvm_shmem.device import Shmem

from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VdevConformance
from qvmcore.testing.fakes import Plugged
from qvmcore.testing.pci import PciConformance


class TestShmem(VdevConformance, MmioConformance, PciConformance, TerminationConformance):
    vdev_class = Shmem

    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        return {"directory": str(tmp_path / "regions"), "create": [{"name": "a", "size": "8K"}]}

    def load(self, device: Plugged[Any]) -> None:
        device.write(0x1C, ord("a"))
        device.write(0x18, 2)
        assert device.read(0x14) == 0
        device.bus.write(device.read(0x8, 8) + 0x8, 4, 1)
