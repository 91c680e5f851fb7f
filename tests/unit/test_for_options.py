"""A vdev whose options say what registers and interrupts it has."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qvmcore import boards
from qvmcore.layout import layout_of
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.fakes import plug
from qvmcore.testing.host import FIRST_LOC, machine
from qvmcore.types import IntrSpec, VdevSpec, Window
from qvmcore.vdev import Vdev


class SizedOptions(msgspec.Struct, frozen=True):
    size: int = 0x1000
    irq: bool = True


class Sized(Vdev):
    vdev_type = "sized"
    Options = SizedOptions

    @classmethod
    def for_options(cls, options: SizedOptions) -> type[Vdev]:
        return type("Sized", (cls,), {"windows": (Window(options.size),), "irqs": int(options.irq)})

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return offset


@pytest.mark.parametrize(("size", "irq"), [(0x1000, True), (0x3000, False)])
def test_the_layout_is_that_of_the_options(size: int, irq: bool) -> None:
    options = SizedOptions(size, irq)
    spec = VdevSpec("sized", "one", options, FIRST_LOC, IntrSpec("gic", 41), "isolate")
    layout = layout_of(boards.get("arm64-virt"), (), [spec], {"sized": Sized})
    (row,) = [row for row in layout.memory if row.owner == "one"]
    assert (row.start, row.size) == (FIRST_LOC, size)
    assert len([row for row in layout.interrupts if row.owner == "one"]) == irq


@pytest.mark.parametrize("size", [0x1000, 0x3000])
def test_a_machine_and_a_test_bench_have_the_window_of_the_options(tmp_path: Path, size: int) -> None:
    seen: list[int] = []

    def script(guest: ScriptedGuest) -> None:
        seen.extend(guest.read32(FIRST_LOC + at) for at in (size - 4, size))
        guest.power_off()

    vm = machine((Sized,), ScriptedEngine(script), tmp_path, options={"sized": {"size": size}})
    assert vm.run().code == 0
    assert seen == [size - 4, 0xFFFF_FFFF]
    with plug(Sized, size=size) as plugged:
        assert [plugged.read(at) for at in (size - 4, size)] == seen
