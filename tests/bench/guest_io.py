#!/usr/bin/env python3
"""Disk I/O of a Linux guest: qvm over PCI, qvm over MMIO, and qemu-system-aarch64 virtio-blk-pci.

Same kernel, initramfs, image, one emulated CPU (cortex-a72, TCG in QEMU) and 256 MiB; the runs take
turns. `dd` in the guest reads and writes the disk directly (O_DIRECT): 1 MiB blocks for throughput,
4 KiB blocks one at a time for requests per second. The clock is the host's, between two lines of the
guest on its PL011. Medians and their ratios; the host's page cache holds the image in all of them.

    python tests/bench/guest_io.py [--runs 5] [--json] [--no-qemu]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISK = 256 << 20
#: Seconds until a guest that does not end is given up.
PATIENCE = 120.0

#: name -> (dd in the guest, units of work it does, what a unit is)
WORK = {
    "read": ("dd if=/dev/vda of=/dev/null bs=1M count=256 iflag=direct", 256, "MiB/s"),
    "write": ("dd if=/dev/zero of=/dev/vda bs=1M count=256 oflag=direct", 256, "MiB/s"),
    "read4k": ("dd if=/dev/vda of=/dev/null bs=4k count=4000 iflag=direct", 4000, "/s"),
    "write4k": ("dd if=/dev/zero of=/dev/vda bs=4k count=4000 oflag=direct", 4000, "/s"),
}
SCRIPT = "".join(
    f"echo bench-start-{name}-; {command} 2>/dev/null && echo bench-end-{name}-\n"
    for name, (command, _, _) in WORK.items()
)

MACHINE = """
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
hostdev = "{disk}"
{place}
"""


def measure(command: list[str]) -> dict[str, float]:
    """Work units a second, by name."""
    seen: dict[str, float] = {}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(PATIENCE, process.kill)
        limit.start()
        text = b""
        while chunk := os.read(process.stdout.fileno(), 4096):
            now = time.monotonic()
            text += chunk
            for mark in re.findall(rb"bench-(?:start|end)-\w+-", text):
                seen.setdefault(mark.decode(), now)
        limit.cancel()
    rates = {}
    for name, (_, units, _) in WORK.items():
        start, end = seen.get(f"bench-start-{name}-"), seen.get(f"bench-end-{name}-")
        if start is None or end is None:
            said = text.decode(errors="replace")[-2000:]
            sys.exit(f"{' '.join(command)[:200]}: the guest did not finish {name}:\n{said}")
        rates[name] = units / (end - start)
    return rates


def commands(folder: Path, guest: Path, disk: Path, qemu: str | None) -> dict[str, list[str]]:
    """What to run, by name."""
    cmdline = "console=ttyAMA0 quiet qvm.exec=" + base64.b64encode(SCRIPT.encode()).decode()
    wanted = {}
    for name, place in (("qvm-pci", ""), ("qvm-mmio", 'loc = 0x1c0d0000\nintr = "gic:41"')):
        path = folder / f"{name}.toml"
        path.write_text(MACHINE.format(guest=guest, cmdline=cmdline, disk=disk, place=place))
        wanted[name] = [sys.executable, "-m", "qvmcore", "-q", "run", str(path)]
    if qemu is not None:
        wanted["qemu-pci"] = [
            qemu, "-M", "virt,gic-version=2", "-cpu", "cortex-a72", "-m", "256", "-nographic", "-no-reboot",
            "-kernel", f"{guest}/vmlinuz", "-initrd", f"{guest}/initramfs.cpio.gz", "-append", cmdline,
            "-net", "none", "-drive", f"if=none,id=d,format=raw,file={disk}",
            "-device", "virtio-blk-pci,drive=d,disable-legacy=on",
        ]  # fmt: skip
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-qemu", action="store_true")
    parser.add_argument("--guest", type=Path, default=ROOT / ".demo" / "debian-arm64")
    arguments = parser.parse_args()
    qemu = None if arguments.no_qemu else shutil.which("qemu-system-aarch64")
    if qemu is None and not arguments.no_qemu:
        sys.exit("qemu-system-aarch64 is not installed: apt-get install qemu-system-arm, or give --no-qemu")
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name) / "disk.img"
        disk.write_bytes(bytes(DISK))
        todo = commands(Path(name), arguments.guest, disk, qemu)
        samples: dict[str, list[dict[str, float]]] = {who: [] for who in todo}
        for _ in range(arguments.runs):
            for who, command in todo.items():
                samples[who].append(measure(command))
    medians = {
        who: {work: statistics.median(row[work] for row in rows) for work in WORK}
        for who, rows in samples.items()
    }
    if arguments.json:
        print(json.dumps({"medians": medians, "samples": samples}))
        return
    for work, (_, _, unit) in WORK.items():
        line = ", ".join(f"{who} {row[work]:,.0f} {unit}" for who, row in medians.items())
        line += f"; pci / mmio {medians['qvm-pci'][work] / medians['qvm-mmio'][work]:.2f}"
        if "qemu-pci" in medians:
            ratio = medians["qvm-pci"][work] / medians["qemu-pci"][work]
            line += f"; qvm-pci / qemu-pci {ratio:.2f} (target >= 0.9)"
        print(f"{work:8} {line}")


if __name__ == "__main__":
    main()
