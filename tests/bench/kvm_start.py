#!/usr/bin/env python3
"""How soon a KVM guest runs after `qvm run`, and what its process needs beside the guest's RAM.

    python tests/bench/kvm_start.py [--runs 9] [--json]

The guest's first instructions send a byte to the 8250, whose other end is this program's pipe. Time is
both wall time and CPU time of all of qvm's threads until that byte; beside it, in the same run, what a
Python does that only starts. On a busy machine the CPU time is the one to look at. Modules have their
compiled bytecode, as pip leaves them, whatever the environment says.

Memory is the resident set of a qvm whose guest has touched all of its RAM, without that RAM, once with
nothing but the board's own vdevs and once with disk, console and card, four CPUs. Needs /dev/kvm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from process import beyond_ram

from qvmcore.plugins import PluginHost

TARGET_MS, TARGET_MB = 250, 80
RAM_MB = 64
#: Of the processes measured; filled in by main.
ENVIRONMENT: dict[str, str] = {}
#: 16-bit: mov dx, 0x3f8; mov al, 'R'; out dx, al; 1: cli; hlt; jmp 1b
HELLO = bytes.fromhex("ba f8 03 b0 52 ee fa f4 eb fc")
#: 32-bit: touch every page from 2 MiB to the end of RAM, send a byte, sleep for ever.
#:   mov edi, 0x200000; 1: mov [edi], edi; add edi, 0x1000; cmp edi, 0x4000000; jb 1b
#:   mov dx, 0x3f8; mov al, 'R'; out dx, al; 2: cli; hlt; jmp 2b
TOUCH = bytes.fromhex(
    "bf 00 00 20 00 89 3f 81 c7 00 10 00 00 81 ff 00 00 00 04 72 f0 66 ba f8 03 b0 52 ee fa f4 eb fc"
)
FILE = """
[system]
name = "bench"
board = "x86_64-pc"
engine = "kvm"
ram = "{ram}M"
cpus = {cpus}
[load]
kernel = "guest.bin"
format = "raw"
{load}
[[vdev]]
type = "ser8250"
name = "uart0"
hostdev = "stdio"
"""
DEVICES = """
[[vdev]]
type = "virtio-blk"
hostdev = "disk.img"
[[vdev]]
type = "virtio-console"
hostdev = ">console"
[[vdev]]
type = "virtio-net"
none = true
"""


def vm_file(folder: Path, code: bytes, load: str, cpus: int = 1, vdevs: str = "") -> Path:
    """A machine in a folder."""
    (folder / "guest.bin").write_bytes(code)
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    path = folder / "bench.toml"
    path.write_text(FILE.format(ram=RAM_MB, load=load, cpus=cpus) + vdevs)
    return path


def environment(folder: Path) -> dict[str, str]:
    """Bytecode is kept, in a place of its own."""
    names = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return names | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}


def started(command: list[str]) -> tuple[subprocess.Popen[bytes], float]:
    """The process, and the seconds until the first byte it says."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    took = time.monotonic() - begin
    if first != b"R":
        process.kill()
        process.communicate()
        sys.exit(f"the guest of {' '.join(command)} did not start; it said {first!r}")
    return process, took


def cost_of_start(command: list[str]) -> tuple[float, float]:
    """(wall seconds to the first byte, CPU seconds of all threads until then)."""
    process, took = started(command)
    try:
        tasks = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
        used = sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
    finally:
        process.kill()
        process.communicate()
    return took, used


def memory_beyond_ram(command: list[str]) -> float:
    """MB of a process that has said its first byte."""
    process, _ = started(command)
    try:
        return beyond_ram(process.pid) * (1 << 20) / 1e6
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if reason := PluginHost().engine("kvm").unusable("x86_64"):
        sys.exit(f"no figures without KVM: {reason}")
    run = [sys.executable, "-m", "qvmcore", "-q", "run"]
    python = [sys.executable, "-c", "print('R', flush=True); input()"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ENVIRONMENT.update(environment(folder))
        hello = str(vm_file(folder, HELLO, "address = 0x7c00"))
        cost_of_start([*run, hello])  # compiles what is not compiled yet
        samples: dict[str, list[tuple[float, float]]] = {"qvm": [], "python": []}
        for _ in range(arguments.runs):
            samples["qvm"].append(cost_of_start([*run, hello]))
            samples["python"].append(cost_of_start(python))
        touch = 'address = 0x100000\nmode = "protected32"'
        small = memory_beyond_ram([*run, str(vm_file(folder, TOUCH, touch))])
        big = memory_beyond_ram([*run, str(vm_file(folder, TOUCH, touch, 4, DEVICES))])
    found = {
        f"{who}_{what}_ms": statistics.median(row[index] for row in rows) * 1000
        for who, rows in samples.items()
        for index, what in enumerate(("wall", "cpu"))
    }
    found |= {"memory_mb": small, "memory_with_virtio_mb": big}
    if arguments.json:
        print(json.dumps({key: round(value, 1) for key, value in found.items()}))
        return
    print(f"start to first guest instruction, medians of {arguments.runs} runs")
    print(f"{'':32} {'wall ms':>8} {'CPU ms':>8}")
    print(f"{'a Python that only starts':32} {found['python_wall_ms']:8.0f} {found['python_cpu_ms']:8.0f}")
    print(
        f"{'qvm run, KVM':32} {found['qvm_wall_ms']:8.0f} {found['qvm_cpu_ms']:8.0f}"
        f"   (target: <= {TARGET_MS} ms)"
    )
    print(f"{'ratio':32} {found['qvm_wall_ms'] / found['python_wall_ms']:8.1f}")
    print(f"memory beyond guest RAM, MB (target: <= {TARGET_MB})")
    print(f"{'board alone, 1 CPU':32} {small:8.1f}")
    print(f"{'disk, console, card, 4 CPUs':32} {big:8.1f}")


if __name__ == "__main__":
    main()
