#!/usr/bin/env python3
"""virtio-blk over vhost-user: `qvm serve` against `qemu-storage-daemon`, through the same drivers.

Both servers export the same raw image, in the host's page cache, one queue, one after the other in each
run. Two drivers measure them:

* ``linux``: the stock virtio_blk of a User Mode Linux guest, by fio with O_DIRECT: 4 KiB random reads and
  writes at depth 1, 8 and 32, and 1 MiB blocks in a row. Rates and latencies are fio's.
* ``driver``: this repository's own vhost-user client, which does nothing but requests: 4 KiB reads and
  writes at depth 1 and 32. Its own Python takes most of the time; it is the same for both.

With --pin the server has one processor and the guest or the client another: otherwise it is the scheduler's
choice, which makes a factor of three at depth 1, by chance. CPU seconds are those of the server's process.
Medians over the runs; latencies in microseconds.

    python tests/bench/vs_qemu_storage_daemon.py [--runs 3] [--seconds 2] [--poll 0] [--pin]
        [--only linux|driver] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qvm_vhost_user.testing import Client  # noqa: E402
from qvm_vhost_user.testing_driver import VhostUserDriver  # noqa: E402
from qvm_virtio_blk.testing import IN, OUT, header  # noqa: E402

from qvmcore.memory import GuestMemory  # noqa: E402
from qvmcore.testing.ring import Piece  # noqa: E402
from qvmcore.types import MemorySpec  # noqa: E402
from tests.foreign.uml import BLK, Uml  # noqa: E402

QSD = "qemu-storage-daemon"
DISK = 256 << 20
BLOCK = 4096
#: name -> (fio's rw, block size, depth, target)
FIO = {
    "read 4k, depth 1": ("randread", "4k", 1, 0.95),
    "read 4k, depth 8": ("randread", "4k", 8, None),
    "read 4k, depth 32": ("randread", "4k", 32, 0.8),
    "write 4k, depth 1": ("randwrite", "4k", 1, 0.95),
    "write 4k, depth 8": ("randwrite", "4k", 8, None),
    "write 4k, depth 32": ("randwrite", "4k", 32, 0.8),
    "read 1M in a row": ("read", "1m", 4, 1.0),
    "write 1M in a row": ("write", "1m", 4, 1.0),
}
#: name -> (request, depth)
DRIVER = {
    "read 4k, depth 1": (IN, 1),
    "read 4k, depth 32": (IN, 32),
    "write 4k, depth 1": (OUT, 1),
    "write 4k, depth 32": (OUT, 32),
}


class Sample(NamedTuple):
    """Requests per second, latencies in microseconds, CPU seconds of the server per million requests."""

    rate: float
    p50: float
    p90: float
    p99: float
    cpu: float


# ---- servers ---------------------------------------------------------------------------------------


@contextmanager
def server(who: str, folder: Path, image: Path, poll: int = 0) -> Iterator[tuple[Path, int]]:
    """The socket and the process number of a running server."""
    socket = folder / who / "disk0.sock"
    socket.parent.mkdir(exist_ok=True)
    if who == "qvm":
        file = folder / "bench.toml"
        file.write_text(f'[[vdev]]\ntype = "virtio-blk"\nname = "disk0"\nhostdev = "{image}"\n')
        words = [
            sys.executable,
            "-m",
            "qvmcore",
            "-q",
            "serve",
            str(file),
            "--vhost-user",
            str(socket.parent),
            "--poll",
            str(poll),
        ]
    else:
        export = f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on"
        words = [QSD, "--blockdev", f"driver=file,node-name=f,filename={image}", "--export", export]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{' '.join(words)}: no socket")
                time.sleep(0.02)
            yield socket, process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def pin(pid: int, processor: int) -> None:
    """Have all threads of a process run on one processor of this machine, if it has more than one."""
    here = sorted(os.sched_getaffinity(pid))
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {here[processor % len(here)]})


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- linux -----------------------------------------------------------------------------------------


def linux(socket: Path, pid: int, seconds: float) -> dict[str, Sample]:
    """fio in a User Mode Linux guest."""
    script = []
    for number, (rw, size, depth, _) in enumerate(FIO.values()):
        script.append(
            f"echo begin{number}-; fio --name=x --filename=/dev/vda --direct=1 --ioengine=libaio --thread "
            f"--rw={rw} --bs={size} --iodepth={depth} --runtime={seconds} --time_based --norandommap "
            f"--output=/run/x.json --output-format=json >/dev/null; echo done{number}-; cat /run/x.json; "
            f"echo printed{number}-"
        )
    guest = Uml("\n".join(script), [(socket, BLK)], modules="virtio_blk", memory=256)
    try:
        cpu = []
        for number in range(len(FIO)):
            guest.expect(rf"^begin{number}-")
            start = cpu_seconds(pid)
            guest.expect(rf"^done{number}-")
            cpu.append(cpu_seconds(pid) - start)
            guest.expect(rf"^printed{number}-")
        text = guest.wait()
    finally:
        guest.close()
    samples = {}
    for number, name in enumerate(FIO):
        match = re.search(rf"^done{number}-\n(.*?)^printed{number}-", text, re.DOTALL | re.MULTILINE)
        assert match is not None
        job = json.loads(match[1][match[1].index("{") :])["jobs"][0]
        side = job["read"] if job["read"]["total_ios"] else job["write"]
        times = side["clat_ns"]["percentile"]
        p50, p90, p99 = (times[f"{each:.6f}"] / 1000 for each in (50, 90, 99))
        samples[name] = Sample(side["iops"], p50, p90, p99, cpu[number] * 1e6 / side["total_ios"])
    return samples


# ---- driver ----------------------------------------------------------------------------------------


def driver(socket: Path, pid: int, seconds: float) -> dict[str, Sample]:
    """Our own client: each request is three descriptors that exist already."""
    memory = GuestMemory.allocate((MemorySpec(0x8000_0000, 4 << 20),))
    samples = {}
    try:
        # The daemon has queues of 128.
        with VhostUserDriver(Client.connect(socket), memory, [128]) as each:
            each.start()
            for name, (kind, depth) in DRIVER.items():
                samples[name] = requests(each, pid, kind, depth, seconds)
    finally:
        memory.close()
    return samples


def requests(each: VhostUserDriver, pid: int, kind: int, depth: int, seconds: float) -> Sample:
    """Keep ``depth`` requests in flight, all over the disk."""
    ring, ram, wait = each.queues[0], each.ram, each.wait
    mark = ram.mark()
    heads = [Piece(ram.put(header(kind)), 16) for _ in range(depth)]
    data = [Piece(ram.alloc(BLOCK, BLOCK), BLOCK) for _ in range(depth)]
    status = [Piece(ram.alloc(1), 1) for _ in range(depth)]
    slots: dict[int, int] = {}
    sent: dict[int, int] = {}
    sector, latencies, done = 0, [], 0
    cpu, start = cpu_seconds(pid), time.monotonic()
    free = list(range(depth))
    now = time.perf_counter_ns
    while True:
        running = time.monotonic() - start < seconds
        if not running and not slots:
            break
        for slot in free if running else ():
            sector = (sector * 5 + 8 * 7919) % (DISK // 512) & ~7
            each.memory.write(heads[slot].address, header(kind, sector))
            if kind == IN:
                request = ring.add_pieces([heads[slot]], [data[slot], status[slot]])
            else:
                request = ring.add_pieces([heads[slot], data[slot]], [status[slot]])
            slots[request.head], sent[request.head] = slot, now()
        free = []
        ring.kick()
        reaped = ring.reap()
        while not reaped:
            assert wait(0), "no answer"
            reaped = ring.reap()
        arrived = now()
        for request in reaped:
            free.append(slots.pop(request.head))
            latencies.append(arrived - sent.pop(request.head))
        done += len(reaped)
    took = time.monotonic() - start
    ram.release(mark)
    p50, p90, p99 = (each / 1000 for each in percentiles(latencies, (50, 90, 99)))
    return Sample(done / took, p50, p90, p99, (cpu_seconds(pid) - cpu) * 1e6 / done)


def percentiles(values: list[int], wanted: Sequence[int]) -> list[int]:
    """Of a list that is sorted on the way."""
    values.sort()
    return [values[min(len(values) - 1, len(values) * each // 100)] for each in wanted]


# ---- report ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--poll", type=int, default=0, help="for qvm serve, microseconds")
    parser.add_argument("--pin", action="store_true", help="a processor for each side")
    parser.add_argument("--only", choices=["linux", "driver"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for program in (QSD, "linux.uml", "fio"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed")
    kinds = {"linux": linux, "driver": driver}
    if arguments.only:
        kinds = {arguments.only: kinds[arguments.only]}
    samples: dict[str, dict[str, list[dict[str, Sample]]]] = {kind: {} for kind in kinds}
    everywhere = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(prefix="qvm-") as name:
        image = Path(name) / "disk.img"
        image.write_bytes(os.urandom(1 << 20) * (DISK >> 20))
        for _ in range(arguments.runs):
            for kind, measure in kinds.items():
                for who in ("qvm", "qsd"):
                    os.sched_setaffinity(0, everywhere)
                    with server(who, Path(name), image, arguments.poll) as (socket, pid):
                        if arguments.pin:
                            pin(pid, 1)
                            pin(os.getpid(), 0)
                        measured = measure(socket, pid, arguments.seconds)
                        samples[kind].setdefault(who, []).append(measured)
    if arguments.json:
        print(json.dumps(samples))
        return
    for kind, rows in samples.items():
        print_table(kind, rows)


def print_table(kind: str, rows: dict[str, list[dict[str, Sample]]]) -> None:
    print(f"{kind:24}       requests/s  p50 us  p90 us  p99 us  CPU s per million")
    for name in rows["qvm"][0]:
        medians = {
            who: Sample(
                *(statistics.median(values) for values in zip(*(run[name] for run in runs), strict=True))
            )
            for who, runs in rows.items()
        }
        for who, each in medians.items():
            print(
                f"  {name:22} {who:4} {each.rate:11,.0f} {each.p50:7.0f} {each.p90:7.0f} {each.p99:7.0f} "
                f"{each.cpu:12.1f}"
            )
        target = FIO[name][3] if kind == "linux" else None
        wanted = f"  (target >= {target})" if target else ""
        print(f"  {'':22} ratio {medians['qvm'].rate / medians['qsd'].rate:10.2f}{wanted}")


if __name__ == "__main__":
    main()
