"""Run by tests/bench/rig_boot.py: how long an unmodified kernel takes to its first program on KVM.

qvm and QEMU by turns with the same kernel, initramfs, command line, memory, number of CPUs and disk. Time
runs from the start of the process to a line of a script in the guest, on the serial port. The line has
the kernel's own time since its start, which is the part of that after VMM and firmware.
"""

from __future__ import annotations

import base64
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig.inside import linux

MARK = re.compile(rb"bench-userspace (\d+\.\d+)\.")
SCRIPT = "read up rest < /proc/uptime; echo bench-userspace $up.; poweroff -f"
RUNS = int(os.environ.get("QVM_RIG_RUNS", "5"))
#: Seconds after which a boot has stalled.
LIMIT = 90.0


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds to the mark, those that the kernel counted), (LIMIT, 0) when it does not come."""
    started = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        said = b""
        try:
            while (match := MARK.search(said)) is None:
                left = started + LIMIT - time.monotonic()
                if not select.select([process.stdout], [], [], max(0.0, left))[0]:
                    print(f"no mark within {LIMIT} s: {' '.join(command)}\n{said.decode(errors='replace')}")
                    return LIMIT, 0.0
                chunk = os.read(process.stdout.fileno(), 4096)
                assert chunk, said.decode(errors="replace")
                said += chunk
            return time.monotonic() - started, float(match[1])
        finally:
            process.kill()


def qvm(folder: Path, cmdline: str) -> list[str]:
    """Our VM; its disk is on PCI like the other's."""
    disk = linux.vdev("virtio-blk", "disk0", hostdev=str(folder / "disk.img"))
    path = linux.machine(folder / "bench.toml", disk, cmdline=cmdline)
    return [sys.executable, "-m", "qvmcore", "run", str(path)]


def qemu(folder: Path, cmdline: str) -> list[str]:
    """QEMU's with PCI Express, without any device the other has not."""
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-serial", "stdio",
        "-kernel", str(linux.GUEST / "vmlinuz"), "-initrd", str(linux.GUEST / "initramfs.cpio.gz"),
        "-append", f"console=ttyS0 quiet {cmdline}",
        "-drive", f"file={folder / 'disk.img'},if=none,id=disk,format=raw",
        "-device", "virtio-blk-pci,drive=disk,disable-legacy=on",
    ]  # fmt: skip


@pytest.mark.timeout(int(LIMIT) * 2 * (RUNS + 1))
def test_boot_times(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """One boot of each is not counted: it reads the files into the page cache."""
    (tmp_path / "disk.img").write_bytes(bytes(16 << 20))
    script = base64.b64encode(SCRIPT.encode()).decode()
    commands = {
        "qvm": qvm(tmp_path, f"qvm.exec={script}"),
        "qemu": qemu(tmp_path, f"qvm.exec={script}"),
    }
    for command in commands.values():
        measure(command)
    for _ in range(RUNS):
        for name, command in commands.items():
            record_property(name, measure(command))
