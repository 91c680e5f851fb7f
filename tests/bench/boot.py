#!/usr/bin/env python3
"""Boot to userspace, qvm (emulated engine) against qemu-system-aarch64 (TCG), alternately in one run.

Same kernel, initramfs, command line, one CPU (cortex-a72), 256 MiB and a virtio-mmio disk. Time runs
from the start of the process to the first line a script in the guest prints on the PL011.

    python tests/bench/boot.py [--runs 5] [--json]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = b"bench-userspace"
SCRIPT = f"echo {MARK.decode()}; poweroff -f"


def vm_file(folder: Path, guest: Path, disk: Path, cmdline: str) -> Path:
    """The machine for qvm."""
    path = folder / "bench.toml"
    path.write_text(
        f"""
[system]
name = "bench"
board = "arm64-virt"
ram = "256M"
[load]
kernel = "{guest}/vmlinuz"
initrd = "{guest}/initramfs.cpio.gz"
cmdline = "{cmdline}"
[[vdev]]
type = "pl011"
name = "uart0"
hostdev = "stdio"
[[vdev]]
type = "virtio-blk"
loc = 0x1c0d0000
intr = "gic:41"
hostdev = "{disk}"
"""
    )
    return path


def measure(command: list[str]) -> tuple[float, float]:
    """(wall seconds to the mark, CPU seconds of the whole process)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        text, reached = b"", 0.0
        while chunk := os.read(process.stdout.fileno(), 4096):
            text += chunk
            if not reached and MARK in text:
                reached = time.monotonic() - started
        process.wait()
    if not reached:
        sys.exit(
            f"the guest of {command[0]} did not reach userspace:\n{text.decode(errors='replace')[-2000:]}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return reached, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--guest", type=Path, default=ROOT / ".demo" / "debian-arm64")
    arguments = parser.parse_args()
    qemu = shutil.which("qemu-system-aarch64")
    if qemu is None:
        sys.exit("qemu-system-aarch64 is not installed: apt-get install qemu-system-arm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk = folder / "disk.img"
        disk.write_bytes(bytes(16 << 20))
        cmdline = "console=ttyAMA0 quiet qvm.exec=" + base64.b64encode(SCRIPT.encode()).decode()
        machine = vm_file(folder, arguments.guest, disk, cmdline)
        commands = {
            "qvm": [sys.executable, "-m", "qvmcore", "-q", "run", str(machine)],
            "qemu": [
                qemu, "-M", "virt", "-cpu", "cortex-a72", "-m", "256", "-nographic", "-no-reboot",
                "-kernel", f"{arguments.guest}/vmlinuz", "-initrd", f"{arguments.guest}/initramfs.cpio.gz",
                "-append", cmdline, "-global", "virtio-mmio.force-legacy=false", "-net", "none",
                "-drive", f"if=none,id=d,format=raw,file={disk}", "-device", "virtio-blk-device,drive=d",
            ],
        }  # fmt: skip
        samples: dict[str, list[tuple[float, float]]] = {"qvm": [], "qemu": []}
        for _ in range(arguments.runs):
            for who, command in commands.items():
                samples[who].append(measure(command))
    result = {
        who: {
            "wall_s": [round(wall, 2) for wall, _ in rows],
            "cpu_s": [round(cpu, 2) for _, cpu in rows],
            "median_wall_s": round(statistics.median(wall for wall, _ in rows), 2),
            "median_cpu_s": round(statistics.median(cpu for _, cpu in rows), 2),
        }
        for who, rows in samples.items()
    }
    ratio = result["qvm"]["median_wall_s"] / result["qemu"]["median_wall_s"]  # type: ignore[operator]
    if arguments.json:
        print(json.dumps({**result, "ratio": round(ratio, 2)}))
        return
    for who, row in result.items():
        print(
            f"{who:5} to userspace: median {row['median_wall_s']:.2f} s wall, {row['median_cpu_s']:.2f} s CPU"
            f"  (walls: {row['wall_s']})"
        )
    print(f"ratio qvm / qemu: {ratio:.2f}  (target <= 1.5)")


if __name__ == "__main__":
    main()
