#!/usr/bin/env python3
"""Disk I/O of a Linux guest: qvm over PCI, qvm over MMIO, and qemu-system-aarch64 virtio-blk-pci.

Same kernel, initramfs, image, one emulated CPU (cortex-a72, TCG in QEMU) and 256 MiB; the runs take
turns. All I/O is direct (O_DIRECT). Throughput: `dd` reads blocks of 1 MiB, and a program of 24
instructions writes such blocks from a buffer that stays as it is. (`dd if=/dev/zero` is measured as
well: it clears a MiB of the guest's memory for every MiB it writes, so it shows the emulated CPU more
than the disk.) Requests per second: a program that reads or writes 4 KiB blocks all over the disk, one
at a time. The clock is the host's, between two lines of the guest on its PL011; beside it stand the
rates per second of CPU time, which other work on the machine changes less. Medians and their ratios;
the host's page cache holds the image in all of them.

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
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DISK = 256 << 20
#: Seconds until a guest that does not end is given up.
PATIENCE = 120.0

#: Requests of one run of the program below.
REQUESTS = 3000
#: Reads (no argument) or writes (one argument) random blocks of /dev/vda, and exits with 0, or with 1
#: when one failed. A64, assembled by GNU as.
CODE = bytes.fromhex(
    "f80340f9 180b0191"  # ldr x24, [sp]; add x24, x24, 66        pread64 is 67, pwrite64 is 68
    "600c8092 01030010 420080d2 2200a0f2 080780d2 010000d4"  # openat(-100, "/dev/vda", O_RDWR|O_DIRECT)
    "f30300aa 147781d2 96020058"  # mov x19, x0; mov x20, 3000; ldr x22, multiplier
    "b55a169b a3fe70d3 63cc74d3"  # loop: madd x21, x21, x22, x22; x3 = (x21 >> 48) << 12
    "e00313aa 010aa0d2 020082d2 e80318aa 010000d4"  # x24(x19, 0x500000, 4096, x3)
    "1f0440f1 200080d2 81000054"  # cmp x0, 4096; mov x0, 1; b.ne exit
    "940600f1 81feff54 000080d2"  # subs x20, x20, 1; b.ne loop; mov x0, 0
    "a80b80d2 010000d4"  # exit: exit(x0)
    "2f646576 2f766461 00000000"  # "/dev/vda"
    "2d7f954c 2df45158"  # multiplier: 6364136223846793005
)


#: Writes 256 blocks of 1 MiB to /dev/vda, one after the other; exits with 0, or with 1 when one failed.
BLOCKS = bytes.fromhex(
    "600c8092 e1020010 420080d2 2200a0f2 080780d2 010000d4"  # openat(-100, "/dev/vda", O_RDWR|O_DIRECT)
    "f30300aa 142080d2 150080d2"  # mov x19, x0; mov x20, 256; mov x21, 0
    "e00313aa 010aa0d2 0202a0d2 e30315aa 880880d2 010000d4"  # loop: pwrite64(x19, 0x500000, 1 MiB, x21)
    "1f0002eb 200080d2 a1000054"  # cmp x0, x2; mov x0, 1; b.ne exit
    "b5024491 940600f1 a1feff54 000080d2"  # add x21, x21, 1 MiB; subs x20, x20, 1; b.ne loop; mov x0, 0
    "a80b80d2 010000d4"  # exit: exit(x0)
    "2f646576 2f766461 00000000"  # "/dev/vda"
)


def program(code: bytes) -> bytes:
    """Code as an ELF file: one segment at 0x400000 that reaches beyond the buffer at 0x500000."""
    base, start = 0x400000, 64 + 56
    size = start + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 183, 1, base + start, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + struct.pack("<IIQQQQQQ", 1, 7, 0, base, base, size, 0x210000, 0x1000) + code


#: name -> (what the guest runs, units of work it does, what a unit is)
WORK = {
    "read": ("dd if=/dev/vda of=/dev/null bs=1M count=256 iflag=direct", 256, "MiB/s"),
    "write": ("/tmp/blocks", 256, "MiB/s"),
    "dd-zero": ("dd if=/dev/zero of=/dev/vda bs=1M count=256 oflag=direct", 256, "MiB/s"),
    "read4k": ("/tmp/random", REQUESTS, "/s"),
    "write4k": ("/tmp/random w", REQUESTS, "/s"),
}
SCRIPT = "".join(
    [
        *(
            f"echo {base64.b64encode(program(code)).decode()} | base64 -d > {path}; chmod +x {path}\n"
            for path, code in (("/tmp/random", CODE), ("/tmp/blocks", BLOCKS))
        ),
        *(
            f"echo bench-start-{name}-; {command} 2>/dev/null && echo bench-end-{name}-\n"
            for name, (command, _, _) in WORK.items()
        ),
    ]
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


class Rate(NamedTuple):
    """Units of work per second of the clock, and per second of CPU time."""

    wall: float
    cpu: float


def measure(command: list[str]) -> dict[str, Rate]:
    """The rates, by name of the work."""
    seen: dict[str, tuple[float, float]] = {}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(PATIENCE, process.kill)
        limit.start()
        text = b""
        while chunk := os.read(process.stdout.fileno(), 4096):
            now = (time.monotonic(), cpu_seconds(process.pid))
            text += chunk
            for mark in re.findall(rb"bench-(?:start|end)-[\w-]+?-(?=\r?\n)", text):
                seen.setdefault(mark.decode(), now)
        limit.cancel()
    rates = {}
    for name, (_, units, _) in WORK.items():
        start, end = seen.get(f"bench-start-{name}-"), seen.get(f"bench-end-{name}-")
        if start is None or end is None:
            said = text.decode(errors="replace")[-2000:]
            sys.exit(f"{' '.join(command)[:200]}: the guest did not finish {name}:\n{said}")
        if start[0] == end[0]:
            return measure(command)  # the host was so busy that both lines were read at once
        rates[name] = Rate(units / (end[0] - start[0]), units / max(0.01, end[1] - start[1]))
    return rates


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far; 0 once it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
        samples: dict[str, list[dict[str, Rate]]] = {who: [] for who in todo}
        for _ in range(arguments.runs):
            for who, command in todo.items():
                samples[who].append(measure(command))
    if arguments.json:
        print(json.dumps(samples))
        return
    for work, (_, _, unit) in WORK.items():
        for kind, suffix in (("wall", ""), ("cpu", " of CPU time")):
            rates = {
                who: statistics.median(getattr(row[work], kind) for row in rows)
                for who, rows in samples.items()
            }
            line = ", ".join(f"{who} {rate:,.0f} {unit}" for who, rate in rates.items())
            line += f"{suffix}; pci / mmio {rates['qvm-pci'] / rates['qvm-mmio']:.2f}"
            if "qemu-pci" in rates:
                target = "  (target >= 0.9)" if kind == "wall" and work != "dd-zero" else ""
                line += f"; qvm-pci / qemu-pci {rates['qvm-pci'] / rates['qemu-pci']:.2f}{target}"
            print(f"{work:8} {line}")


if __name__ == "__main__":
    main()
