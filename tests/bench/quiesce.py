#!/usr/bin/env python3
"""How fast devices are quiet, and what the guard process costs; with simulated devices.

    python tests/bench/quiesce.py [--json] [--deaths 100] [--memory MIB]

The devices live in memory that VM, guard and this process share, so the times are those of processes,
signals and threads alone: no register access costs anything, and a reset waits as long as a real one.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from qvm_quiesce.attach import attach
from qvm_quiesce.clock import RealClock
from qvm_quiesce.evidence import Verdict
from qvm_quiesce.guard import Guard
from qvm_quiesce.guard_main import SWITCH_INTERVAL
from qvm_quiesce.runner import Quiesce
from qvm_quiesce.simulated import Faults, SimulatedDevice, shared
from qvm_quiesce.subject import Policy

#: A VM process as the guard sees it: it has a device, a guard, and is killed.
VM = """
import json, mmap, os, sys
from pathlib import Path
from qvm_quiesce.attach import attach
from qvm_quiesce.guard import Guard
from qvm_quiesce.simulated import adopt
from qvm_quiesce.subject import Policy

values, fds, state, mebibytes = json.loads(sys.argv[1])
# Memory as a guest's RAM is: shared, and written to.
ram = os.memfd_create("ram")
os.ftruncate(ram, mebibytes << 20)
memory = mmap.mmap(ram, mebibytes << 20) if mebibytes else b""
for start in range(0, len(memory), 4096):
    memory[start] = 1
device = adopt(values, fds)
guard = Guard.start("bench", [(device, attach(device), Policy(watch=0.001))], Path(state))
device.start()
print(guard.pid, flush=True)
sys.stdin.readline()
"""
GUARD_RUNS = 15


def death(state: Path, mebibytes: int = 0) -> float:
    """Milliseconds from the SIGKILL of a VM with so much memory to bus mastering off."""
    device = shared("0000:01:00.0")
    handover = device.handover()
    text = json.dumps([handover.values, handover.fds, str(state), mebibytes])
    with subprocess.Popen(
        [sys.executable, "-c", VM, text],
        pass_fds=handover.fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        guard = int(process.stdout.readline())
        watched = os.pidfd_open(guard)
        if not device.running:
            sys.exit("the device does not run")
        time.sleep(0.05)
        began = time.perf_counter()
        process.send_signal(signal.SIGKILL)
        while device.running:
            # Asleep, not spinning: on a small machine the guard needs this processor.
            time.sleep(0.0001)
        took = time.perf_counter() - began
    select.select([watched], [], [])
    os.close(watched)
    for fd in handover.fds:
        os.close(fd)
    return took * 1e3


def whole(count: int) -> float:
    """Seconds a whole quiesce of ``count`` devices takes, each with a reset of 100 ms."""
    clock = RealClock()
    devices = [SimulatedDevice(f"0000:01:{n:02x}.0", Faults(reset_takes=0.1), clock) for n in range(count)]
    records = [attach(device) for device in devices]
    for device in devices:
        device.start()
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.005):
            for device in devices:
                device.tick()

    thread = threading.Thread(target=live)
    thread.start()
    work = Quiesce("bench", "bench", [(d, r, Policy()) for d, r in zip(devices, records, strict=True)])
    began = time.perf_counter()
    work.stop_dma("bench")
    verdict = work.prove()
    took = time.perf_counter() - began
    over.set()
    thread.join()
    if verdict is not Verdict.QUIESCED:
        sys.exit(f"not quiesced: {verdict.value}")
    return took


def guards(state: Path) -> tuple[float, float]:
    """(milliseconds to start a guard until it watches, MiB it has), medians."""
    times, sizes = [], []
    device = shared("0000:01:00.0")
    record = attach(device)
    for _ in range(GUARD_RUNS):
        began = time.perf_counter()
        guard = Guard.start("bench", [(device, record, Policy())], state)
        times.append((time.perf_counter() - began) * 1e3)
        text = Path(f"/proc/{guard.pid}/status").read_text()
        sizes.append(int(text.split("VmRSS:")[1].split()[0]) / 1024)
        guard.dismiss()
    return statistics.median(times), statistics.median(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--deaths", type=int, default=100)
    parser.add_argument("--memory", type=int, default=0, metavar="MIB", help="memory of the VM that dies")
    arguments = parser.parse_args()
    # As in a VM and in its guard.
    sys.setswitchinterval(SWITCH_INTERVAL)
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        deaths = [death(state, arguments.memory) for _ in range(arguments.deaths)]
        start, size = guards(state)
    one, eight = (statistics.median(whole(count) for _ in range(5)) for count in (1, 8))
    rows = {
        "death_to_bus_mastering_off_ms_median": (statistics.median(deaths), 5),
        "death_to_bus_mastering_off_ms_worst": (max(deaths), None),
        "quiesce_of_one_device_s": (one, None),
        "quiesce_of_eight_devices_s": (eight, None),
        "eight_devices_against_one": (eight / one, 1.3),
        "guard_start_ms": (start, 60),
        "guard_memory_mib": (size, 25),
    }
    if arguments.json:
        print(json.dumps({key: round(value, 3) for key, (value, _) in rows.items()}))
        return
    for key, (value, target) in rows.items():
        goal = f"   (target <= {target})" if target is not None else ""
        print(f"{key.replace('_', ' '):45} {value:8.2f}{goal}")
    load = f"load of the host {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    print(f"{arguments.deaths} deaths with {arguments.memory} MiB; {load}")


if __name__ == "__main__":
    main()
