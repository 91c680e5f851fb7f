"""A real Linux guest from start to every kind of end."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., object]

DISK = """
[[vdev]]
type = "virtio-blk"
name = "disk0"
loc = 0x1c0d0000
intr = "gic:41"
hostdev = "{path}"
"""


def make_disk(path: Path, size: int = 16 << 20) -> str:
    path.write_bytes(bytes(size))
    return DISK.format(path=path)


def test_a_script_in_the_guest_runs_and_its_status_comes_back(start: Start) -> None:
    vm = start("uname -m; cat /proc/interrupts; exit 7")
    assert vm.wait() == 0
    assert "aarch64" in vm.text
    assert "qvm-guest-exit: 7" in vm.text
    assert "ended: guest-shutdown" in vm.text


def test_reboot_ends_the_vm_with_0(start: Start) -> None:
    vm = start("reboot -f")
    assert vm.wait() == 0
    assert "ended: guest-reset" in vm.text


def test_kernel_panic_with_panic_1_ends_as_reset(start: Start) -> None:
    vm = start("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60", cmdline="panic=1")
    assert vm.wait() == 0
    assert "ended: guest-reset" in vm.text


def test_sigterm_reaches_the_guest_as_the_power_key_and_it_powers_off(start: Start) -> None:
    vm = start("echo listening; sleep 1000", cmdline="qvm.button")
    vm.expect("listening")
    time.sleep(1)  # the listener of the guest opens its input device beside the script
    vm.send(signal.SIGTERM)
    assert vm.wait(60) == 0
    assert "asked the guest to power off" in vm.text
    assert "ended: guest-shutdown" in vm.text


#: The key's interrupt is enabled, but nobody listens.
DEAF = """
cd /sys/class/gpio
for chip in gpiochip*; do echo $(($(cat $chip/base) + 3)) > export; done
for line in gpio[0-9]*; do echo rising > $line/edge; done
echo up; while :; do sleep 1000; done
"""


def test_a_second_sigterm_cuts_the_power(start: Start) -> None:
    vm = start(DEAF)
    vm.expect("up")
    vm.send(signal.SIGTERM)
    vm.expect("asked the guest to power off")
    vm.send(signal.SIGTERM)
    assert vm.wait(60) == 3
    assert "power cut by a second SIGTERM" in vm.text


def test_a_guest_that_ignores_the_button_is_cut_after_the_time_out(start: Start) -> None:
    vm = start(DEAF, args=["--set", "system.shutdown-timeout=1"])
    vm.expect("up")
    vm.send(signal.SIGINT)
    assert vm.wait(60) == 3
    assert "did not power off within 1 s" in vm.text


def test_sigterm_with_nobody_listening_cuts_at_once(start: Start) -> None:
    vm = start("echo up; sleep 1000")
    vm.expect("up")
    vm.send(signal.SIGTERM)
    assert vm.wait(60) == 3
    assert "no vdev can tell the guest" in vm.text


def test_sigquit_cuts_at_once_with_3(start: Start) -> None:
    vm = start("echo up; sleep 1000")
    vm.expect("up")
    vm.send(signal.SIGQUIT)
    assert vm.wait(60) == 3


def test_a_busy_guest_is_cut_as_well(start: Start) -> None:
    vm = start("echo up; while :; do :; done")
    vm.expect("up")
    vm.send(signal.SIGQUIT)
    assert vm.wait(60) == 3


def test_kill_9_frees_the_disk_and_the_next_run_can_use_it(start: Start, tmp_path: Path) -> None:
    vdevs = make_disk(tmp_path / "disk.img")
    vm = start("echo up; sleep 1000", vdevs=vdevs)
    vm.expect("up")
    vm.send(signal.SIGKILL)
    assert vm.wait(60) == -9
    again = start("dd if=/dev/vda of=/dev/null bs=64k count=4 2>/dev/null && echo read-ok", vdevs=vdevs)
    assert again.wait() == 0
    assert "read-ok" in again.text


def test_two_vms_cannot_write_one_disk(start: Start, tmp_path: Path) -> None:
    vdevs = make_disk(tmp_path / "disk.img")
    first = start("echo up; sleep 1000", vdevs=vdevs)
    first.expect("up")
    second = start("true", vdevs=vdevs)
    assert second.wait(60) == 64
    assert "disk.img" in second.text
    assert "Traceback" not in second.text
    first.send(signal.SIGQUIT)
    assert first.wait(60) == 3


def test_read_only_disk_by_angle_bracket(start: Start, tmp_path: Path) -> None:
    vdevs = make_disk(tmp_path / "disk.img").replace('hostdev = "', 'hostdev = "<')
    vm = start("cat /sys/block/vda/ro; echo x > /dev/vda || echo refused", vdevs=vdevs)
    assert vm.wait() == 0
    assert "\n1\n" in vm.text
    assert "write error: Operation not permitted\nrefused" in vm.text
    assert (tmp_path / "disk.img").read_bytes() == bytes(16 << 20)


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, None])
def test_the_terminal_is_restored_after_every_end(files: Path, number: signal.Signals | None) -> None:
    """On a pseudo-terminal: the guest knows its size; raw while it runs, as it was afterwards."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (37, 91))
    before = termios.tcgetattr(slave)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(master)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
        os.chdir(files)
        line = "load.cmdline=console=hvc0 quiet"
        os.execv(sys.executable, [sys.executable, "-m", "qvmcore", "run", "vm.toml", "--set", line])
    output = b""
    deadline = time.monotonic() + 240
    while b"End it with" not in output:
        assert time.monotonic() < deadline, output
        output += os.read(master, 4096)
    assert termios.tcgetattr(slave)[3] & termios.ICANON == 0
    os.write(master, b"stty size\n")
    while b"37 91" not in output:
        assert time.monotonic() < deadline, output
        output += os.read(master, 4096)
    if number is None:
        os.write(master, b"poweroff\n")
    else:
        os.kill(pid, number)
        if number is not signal.SIGQUIT:
            time.sleep(0.3)
            os.kill(pid, number)
    os.set_blocking(master, False)
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline
        try:
            os.read(master, 4096)
        except BlockingIOError:
            time.sleep(0.02)
    assert os.waitstatus_to_exitcode(done[1]) in ((0,) if number is None else (0, 3))
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_status_tells_of_the_running_guest_and_nothing_is_left_of_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def status(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qvmcore", "status", *args]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    vdevs = make_disk(tmp_path / "disk.img")
    vm = start("dd if=/dev/vda of=/dev/null bs=64k count=4 2>/dev/null; echo up; sleep 1000", vdevs=vdevs)
    vm.expect("up")
    (listed,) = json.loads(status("--json").stdout)
    assert (listed["name"], listed["pid"], listed["state"]) == ("test", vm.process.pid, "running")
    report = json.loads(status("test", "--json").stdout)
    assert report["guest"]["status"]["interrupts"] > 0
    (disk,) = (each for each in report["vdevs"] if each["name"] == "disk0")
    assert (disk["fault"], disk["problem"]) == ("", "")
    assert disk["status"]
    text = status("test").stdout
    assert text.startswith(
        f"test: running, arm64-virt, engine emulated, 1 CPU, 256M, pid {vm.process.pid}, up "
    )
    second = start("echo second; sleep 1000")
    second.expect("second")
    assert [row["name"] for row in json.loads(status("--json").stdout)] == ["test", "test.2"]
    second.send(signal.SIGKILL)
    second.wait(60)
    assert [row["name"] for row in json.loads(status("--json").stdout)] == ["test"]
    assert "test.2" not in os.listdir(tmp_path / "qvm")
    vm.send(signal.SIGQUIT)
    assert vm.wait(60) == 3
    assert os.listdir(tmp_path / "qvm") == []
    gone = status("test")
    assert gone.returncode == 64
    assert "no running VM is called 'test'" in gone.stderr


def test_sigusr2_dumps_the_running_guest_and_it_goes_on(start: Start, files: Path) -> None:
    vm = start("i=0; while [ $i -lt 8 ]; do i=$((i + 1)); echo tick $i; sleep 0.5; done")
    vm.expect("tick 2")
    vm.send(signal.SIGUSR2)
    vm.expect("guest dump in")
    assert vm.wait() == 0
    assert "tick 8" in vm.text
    (core,) = files.glob("test-*.gcore")
    assert b"Linux version 6." in core.read_bytes()
