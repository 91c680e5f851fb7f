"""The contracts every vdev keeps, applied to the three PC devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from qvm_pc.acpi_pm import ENABLES, PM1_ENABLE, TIMER, AcpiPm
from qvm_pc.mc146818 import DATA, INDEX, Mc146818
from qvm_pc.rtc import B_24H, B_PIE, A, B
from qvm_pc.ser8250 import Ser8250
from qvm_pc.uart16550 import IER, THR

from qvmcore.api import Trigger
from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VdevConformance
from qvmcore.testing.fakes import Plugged


class TestSer8250(VdevConformance, MmioConformance, TerminationConformance):
    vdev_class = Ser8250

    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        """A host that sends: the FIFO may not be opened twice by the kit without one."""
        fifo = tmp_path / "in"
        if not fifo.exists():
            os.mkfifo(fifo)
        return {"hostdev": f"<{fifo}"}

    def load(self, device: Plugged[Any]) -> None:
        device.write(IER, 0x0F, 1)
        for byte in b"last words":
            device.write(THR, byte, 1)


class TestMc146818(VdevConformance, MmioConformance, TerminationConformance):
    vdev_class = Mc146818
    volatile = frozenset({DATA})  # the time of day, and a memory with a battery

    def load(self, device: Plugged[Any]) -> None:
        for index, value in ((A, 0x26), (B, B_PIE | B_24H)):
            device.write(INDEX, index, 1)
            device.write(DATA, value, 1)


class TestAcpiPm(VdevConformance, MmioConformance, TerminationConformance):
    vdev_class = AcpiPm
    volatile = frozenset({TIMER})

    def load(self, device: Plugged[Any]) -> None:
        device.write(PM1_ENABLE, ENABLES, 2)
        assert device.vdev.on_button()


@pytest.mark.parametrize(
    ("vdev", "hid", "ports"),
    [(Ser8250, "PNP0501", 8), (Mc146818, "PNP0B00", 2), (AcpiPm, "", 16)],
    ids=["ser8250", "mc146818", "acpi-pm"],
)
def test_they_lie_in_the_port_space_and_are_announced(vdev: type[Any], hid: str, ports: int) -> None:
    assert (vdev.space, vdev.acpi_hid) == ("io", hid)
    assert [window.size for window in vdev.windows] == [ports]
    assert (vdev.irqs, vdev.trigger) == (1, Trigger.LEVEL)
