"""Every way a Linux guest on KVM can end, and the exit code of each."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.rig.inside import linux
from tests.rig.inside.conftest import Start

PANIC = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60"


def test_poweroff_ends_with_0_and_the_script_s_status_comes_back(start: Start) -> None:
    vm = start("uname -m; exit 7")
    assert vm.wait() == 0, vm.text
    assert "x86_64" in vm.text
    assert "qvm-guest-exit: 7" in vm.text
    assert "ended: guest-shutdown" in vm.text


def test_reboot_ends_with_0(start: Start) -> None:
    """By the reset register of the FADT, Linux's first choice."""
    vm = start("reboot -f")
    assert vm.wait() == 0, vm.text
    assert "ended: guest-reset" in vm.text


def test_panic_ends_as_a_reset(start: Start) -> None:
    vm = start(PANIC, cmdline="panic=-1")
    assert vm.wait() == 0, vm.text
    assert "ended: guest-reset" in vm.text


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_triple_fault_is_a_crash_with_7(start: Start, cpus: int) -> None:
    vm = start("reboot -f", cmdline="reboot=triple", cpus=cpus)
    assert vm.wait() == 7, vm.text
    assert "ended: guest-crash" in vm.text
    assert "triple fault" in vm.text


def test_sigterm_is_the_power_button_of_acpi(start: Start) -> None:
    vm = start("echo listening; sleep 1000", cmdline="qvm.button")
    vm.expect("listening")
    time.sleep(5)  # the listener of the guest opens its input device beside the script
    vm.send(signal.SIGTERM)
    assert vm.wait() == 0, vm.text
    assert "asked the guest to power off" in vm.text
    assert "qvm-guest: power button" in vm.text
    assert "ended: guest-shutdown" in vm.text


@pytest.mark.parametrize("script", ["sleep 1000", "while :; do :; done"], ids=["idle", "busy"])
def test_sigquit_cuts_the_power_with_3(start: Start, script: str) -> None:
    vm = start(f"echo up; {script}", cpus=2)
    vm.expect("up\n")
    vm.send(signal.SIGQUIT)
    assert vm.wait(60) == 3, vm.text
    assert "ended: sigquit" in vm.text


def test_kill_9_frees_the_disk_and_the_next_run_can_use_it(start: Start, tmp_path: Path) -> None:
    disk = linux.vdev("virtio-blk", "disk0", hostdev=str(linux.ext4(tmp_path / "disk.img", 16 << 20)))
    vm = start("echo up; sleep 1000", disk)
    vm.expect("up\n")
    vm.send(signal.SIGKILL)
    assert vm.wait(60) == -9
    again = start("mount -t ext4 /dev/vda /mnt && umount /mnt && echo mounted", disk)
    assert again.wait() == 0, again.text
    assert "mounted" in again.text


def test_ten_boots_in_a_row(start: Start) -> None:
    """Each starts, sees both CPUs, and powers off; none hangs on a lost interrupt."""
    for _ in range(10):
        vm = start("echo cpus: $(grep -c ^processor /proc/cpuinfo)", cpus=2)
        assert vm.wait() == 0, vm.text
        assert "cpus: 2" in vm.text, vm.text
