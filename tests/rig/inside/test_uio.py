"""Devices of the machine's own UIO drivers, passed to guests on KVM.

Debian's kernels have no driver for platform devices with an interrupt (uio_pdrv_genirq is not built). What
they have: a driver with maps, whose device has no interrupt, and one with an interrupt, without maps.
"""

from __future__ import annotations

import mmap
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qvm_quiesce import state as files
from qvm_vfio.errors import VfioError
from qvm_vfio.kernel import Kernel
from qvm_vfio.sysfs import PciFunction
from qvm_vfio.uio import UioHardware, UioKernel, find, open_uio

from qvmcore import control
from tests.rig.inside import linux
from tests.rig.inside.conftest import Start
from tests.rig.inside.devices import bound, guard_s_record

LOC, SIZE = 0xC000_0000, 0x10_0000
CONTROL = 0x1014
#: QEMU's shared memory device, and its memory's BAR, which the driver calls map 1.
VENDOR, DEVICE = 0x1AF4, 0x1110
SCRIPT = f"""script = [
  {{ bar = 1, offset = {CONTROL}, mask = 1, write = 0 }},
  {{ bar = 1, offset = {CONTROL}, mask = 1, equals = 0 }},
]
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records and quarantine go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


class Cells:
    """The device's registers as the machine itself sees them, and its name for UIO."""

    def __init__(self) -> None:
        (place,) = [
            path
            for path in Path("/sys/bus/pci/devices").iterdir()
            if [int((path / name).read_text(), 16) for name in ("vendor", "device")] == [VENDOR, DEVICE]
        ]
        if not (place / "uio").exists():
            Path("/sys/bus/pci/drivers/hilscher/new_id").write_text(f"{VENDOR:x} {DEVICE:x}")
        (self.uio,) = [path.name for path in (place / "uio").iterdir()]
        # Not by sysfs: the kernel keeps what a driver has claimed from it.
        with Path(f"/dev/{self.uio}").open("r+b", buffering=0) as file:
            self._memory = mmap.mmap(file.fileno(), SIZE, offset=mmap.PAGESIZE)

    def read(self, offset: int) -> int:
        """4 bytes."""
        return int.from_bytes(self._memory[offset : offset + 4], "little")

    def write(self, offset: int, value: int) -> None:
        """4 bytes."""
        self._memory[offset : offset + 4] = value.to_bytes(4, "little")


@pytest.fixture(scope="module")
def cells() -> Cells:
    return Cells()


def passed(cells: Cells, script: str = SCRIPT, **options: object) -> str:
    """The device, and who quiesces it."""
    more = {"map": 1, "size": SIZE, "irq": "none", **options}
    require = "\n[safety]\nrequire-quiesce = true\n" if script else ""
    uio = linux.vdev("pass-uio", "cells", uio=cells.uio, loc=LOC, **more)
    return require + uio + linux.vdev("quiesce", "quiet") + script


@pytest.mark.parametrize("direct", [True, False])
def test_a_guest_reaches_the_registers_and_the_script_stops_the_device(
    start: Start, cells: Cells, direct: bool
) -> None:
    cells.write(0x2000, 0x600D_F00D)
    cells.write(CONTROL, 0)
    script = (
        f"devmem {LOC + CONTROL:#x} 32 0x31; echo read $(devmem {LOC + 0x2000:#x} 32);"
        "echo done; read word; poweroff -f"
    )
    vm = start(script, passed(cells, direct=direct))
    vm.expect("done\n")
    assert "read 0x600DF00D" in vm.text
    assert cells.read(CONTROL) == 0x31
    report = control.ask(control.find(str(vm.process.pid)))
    (vdev,) = [each for each in report["vdevs"] if each["name"] == "cells"]
    count = vdev["status"]["reads"] + vdev["status"]["writes"]
    print(f"direct {direct}: {count} accesses came to the vdev")
    assert (count == 0) == direct
    assert report["guest"]["status"]["direct"] == direct
    vm.type("\n")
    assert vm.wait() == 0, vm.text
    assert "quiesce: QUIESCED" in vm.text
    assert cells.read(CONTROL) == 0x30


def test_a_guard_runs_the_script_of_a_killed_vm(start: Start, cells: Cells) -> None:
    cells.write(CONTROL, 0)
    vm = start(f"devmem {LOC + CONTROL:#x} 32 0x31; echo set; sleep 1000", passed(cells))
    vm.expect("set\n")
    assert cells.read(CONTROL) == 0x31
    killed = time.monotonic()
    vm.send(signal.SIGKILL)
    while cells.read(CONTROL) != 0x30:
        assert time.monotonic() < killed + 60
        time.sleep(0.0005)
    print(f"death to the end of the script: {(time.monotonic() - killed) * 1e3:.0f} ms")
    vm.wait(60)
    guard_s_record()


def test_without_a_script_it_is_not_called_quiet(start: Start, cells: Cells) -> None:
    vm = start("poweroff -f", passed(cells, ""))
    assert vm.wait() == 8, vm.text
    assert "cannot be proven quiet: it has no register script" in vm.text
    ((_, body),) = files.records()
    assert body is not None
    assert body["verdict"] == "DEGRADED"


def test_the_kernel_refuses_what_is_no_page(cells: Cells) -> None:
    """Its map 0 has 256 bytes."""
    hardware = open_uio(cells.uio, interrupt=False)
    try:
        with pytest.raises(VfioError, match=r"map 0 cannot be mapped.*whole pages only"):
            hardware.bar_read(0, 0, 4)
    finally:
        hardware.close()


# -- a real interrupt ----------------------------------------------------------------------------------


@pytest.fixture
def edu() -> Iterator[tuple[UioHardware, mmap.mmap]]:
    """QEMU's teaching device at the driver that has no maps, and its registers by sysfs."""
    function = PciFunction(Kernel(), bound("edu"))
    function.bind("uio_pci_generic")
    (entry,) = [path.name for path in (function.path / "uio").iterdir()]
    hardware = open_uio(entry, UioKernel())
    with (function.path / "resource0").open("r+b") as file:
        registers = mmap.mmap(file.fileno(), 0x1000)
    yield hardware, registers
    hardware.close()
    function.bind("vfio-pci")


def test_a_real_interrupt_is_waited_for_and_counted(edu: tuple[UioHardware, mmap.mmap]) -> None:
    hardware, registers = edu
    assert find(hardware.label, UioKernel()) == hardware.name.removeprefix("uio:")
    before = hardware.interrupts()
    assert not hardware.take()
    memoryview(registers).cast("I")[0x60 // 4] = 1
    assert select.select([hardware.waitable], [], [], 10)[0]
    assert hardware.take()
    assert not hardware.take()
    assert hardware.interrupts() == before + 1, "masked by the driver: it stays with one"
    memoryview(registers).cast("I")[0x64 // 4] = 1
    with pytest.raises(VfioError, match="its driver has no control of the interrupt"):
        hardware.enable_interrupt(True)
