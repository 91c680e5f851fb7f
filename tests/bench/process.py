#!/usr/bin/env python3
"""What a qvm process costs beside its guest: import, start, memory, an idle guest.

    python tests/bench/process.py [--json]

CPU times, so other load on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: movz x0, #8; movk x0, #0x8400, lsl #16; hvc #0 = PSCI SYSTEM_OFF: a guest of three instructions.
POWER_OFF = struct.pack("<3I", 0xD2800100, 0xF2B08000, 0xD4000002)
IDLE_SECONDS = 10


def cpu_of(command: list[str]) -> float:
    """CPU seconds of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def median_cpu(command: list[str], runs: int = 7) -> float:
    """Median CPU seconds."""
    return statistics.median(cpu_of(command) for _ in range(runs))


def machine(folder: Path, load: str) -> Path:
    """A VM file with both virtio vdevs' usual place."""
    path = folder / "bench.toml"
    path.write_text(f'[system]\nname = "bench"\nboard = "arm64-virt"\nram = "256M"\n[load]\n{load}\n')
    return path


def beyond_ram(pid: int) -> float:
    """Resident MiB of a process without the mapping that is the guest's RAM."""
    total, skip = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            skip = "memfd:qvm-ram" in line
        elif line.startswith("Rss:") and not skip:
            total += int(line.split()[1])
    return total / 1024


def cpu_ticks(pid: int) -> float:
    """CPU seconds a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_guest(folder: Path, guest: Path) -> tuple[float, float]:
    """(percent of a core of an idle guest at its shell, MiB beyond guest RAM)."""
    load = (
        f'kernel = "{guest}/vmlinuz"\ninitrd = "{guest}/initramfs.cpio.gz"\n'
        'cmdline = "console=ttyAMA0 quiet"\n'
        '[[vdev]]\ntype = "pl011"\nname = "uart0"\nhostdev = "stdio"'
    )
    command = [sys.executable, "-m", "qvmcore", "-q", "run", str(machine(folder, load))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        text = b""
        while b"End it with" not in text:
            chunk = os.read(process.stdout.fileno(), 4096)
            if not chunk:
                sys.exit(f"the guest did not boot:\n{text.decode(errors='replace')}")
            text += chunk
        time.sleep(5)  # the kernel's own late work is no idle time
        before = cpu_ticks(process.pid)
        time.sleep(IDLE_SECONDS)
        used = cpu_ticks(process.pid) - before
        memory = beyond_ram(process.pid)
        process.send_signal(signal.SIGQUIT)
        process.stdout.read()
    return used / IDLE_SECONDS * 100, memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--guest", type=Path, default=ROOT / ".demo" / "debian-arm64")
    arguments = parser.parse_args()
    python = [sys.executable, "-c"]
    nothing = median_cpu([*python, "pass"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "off.bin").write_bytes(POWER_OFF)
        off = str(machine(folder, 'kernel = "off.bin"\nformat = "raw"'))
        start = median_cpu([sys.executable, "-m", "qvmcore", "-q", "run", off])
        idle, memory = idle_guest(folder, arguments.guest)
    rows = {
        "import_qvmcore_ms_cpu": ((median_cpu([*python, "import qvmcore"]) - nothing) * 1e3, 60),
        "import_qvmcore_api_ms_cpu": ((median_cpu([*python, "import qvmcore.api"]) - nothing) * 1e3, 60),
        "run_to_first_instruction_and_off_s_cpu": (start, 0.4),
        "idle_guest_percent_of_a_core": (idle, 3),
        "memory_beyond_guest_ram_mib": (memory, 120),
    }
    if arguments.json:
        print(json.dumps({key: round(value, 3) for key, (value, _) in rows.items()}))
        return
    for key, (value, target) in rows.items():
        print(f"{key.replace('_', ' '):45} {value:8.2f}   (target <= {target})")


if __name__ == "__main__":
    main()
