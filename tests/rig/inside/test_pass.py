"""Guests on KVM with a physical NVMe drive of the rig's machine."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from qvm_quiesce import state as files

from qvmcore import control
from tests.rig.inside import linux
from tests.rig.inside.conftest import Start
from tests.rig.inside.devices import bound, guard_s_record, until_off

MOUNT = "mount -t ext4 /dev/nvme0n1 /mnt"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records and quarantine go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return files.folder()


def drive(**options: object) -> str:
    """The drive, and who quiesces it."""
    passed = linux.vdev("pass", "drive", device=f"pci:{bound('plain')}", **options)
    return passed + linux.vdev("quiesce", "quiet")


def test_its_registers_are_mapped_into_the_guest(start: Start, state: Path) -> None:
    """Reading 8 MiB takes thousands of accesses of the drive's doorbells; none of them comes to us."""
    script = "dd if=/dev/nvme0n1 of=/dev/null bs=4k count=2000 iflag=direct 2>/dev/null && echo read; sleep 5"
    counts = {}
    for direct in (True, False):
        vm = start(script, drive(direct=direct))
        vm.expect("read\n")
        report = control.ask(control.find(str(vm.process.pid)))
        (vdev,) = [each for each in report["vdevs"] if each["name"] == "drive"]
        counts[direct] = vdev["status"]["reads"] + vdev["status"]["writes"]
        assert report["guest"]["status"]["direct"] == (1 if direct else 0), report["guest"]
        assert vm.wait() == 0, vm.text
        assert "quiesce: QUIESCED" in vm.text
    print(f"accesses that came to the vdev: {counts}")
    assert counts[True] == 0
    assert counts[False] > 4000


@pytest.mark.parametrize("direct", [True, False])
def test_the_guest_resets_the_drive_and_goes_on_with_it(start: Start, state: Path, direct: bool) -> None:
    """A function level reset under the driver's feet, as the guest's sysfs does it; two CPUs."""
    place = "/sys/block/nvme0n1/device/device"
    read = "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=50 iflag=direct 2>/dev/null"
    script = f"{read} && cat {place}/reset_method && echo 1 > {place}/reset && {read} && echo still there"
    vm = start(script, drive(direct=direct), cpus=2)
    assert vm.wait() == 0, vm.text
    assert "flr" in vm.text
    assert "still there" in vm.text
    assert "quiesce: QUIESCED" in vm.text


def test_a_guest_mounts_a_file_system_on_a_passed_drive(start: Start, state: Path) -> None:
    vm = start(f"{MOUNT} && echo of the first > /mnt/file && umount /mnt && echo written", drive())
    assert vm.wait() == 0, vm.text
    assert "written" in vm.text
    assert "quiesce: QUIESCED" in vm.text
    again = start(f"{MOUNT} && cat /mnt/file; grep -i nvme /proc/interrupts", drive())
    assert again.wait() == 0, again.text
    assert "of the first" in again.text
    assert "MSI" in again.text


def test_a_guest_killed_in_mid_write_leaves_a_drive_for_the_next_one(start: Start, state: Path) -> None:
    write = "dd if=/dev/zero of=/mnt/big bs=64k count=100 conv=fsync 2>/dev/null"
    vm = start(f"{MOUNT} && echo writing && while :; do {write}; done", drive())
    vm.expect("writing\n")
    time.sleep(2)
    killed = time.monotonic()
    vm.send(signal.SIGKILL)
    print(f"death to bus mastering off: {until_off('plain', killed):.1f} ms")
    vm.wait(60)
    guard_s_record()
    again = start(f"{MOUNT} && echo second > /mnt/two && sync && echo works", drive())
    assert again.wait() == 0, again.text
    assert "works" in again.text
