#!/usr/bin/env python3
"""Disk I/O of a Linux guest in QEMU: virtio-blk by `qvm serve --vfio-user` against QEMU's virtio-blk-pci.

One guest (TCG, one CPU) has both disks, each on an image of its own in the host's page cache; `dd` in the
guest reads and writes them by turns, with O_DIRECT, in blocks of 4 KiB and of 1 MiB, one at a time. The
seconds are the guest's own. Medians over the rounds and their ratios.

QEMU is that of a later Debian release, in qvm's cache (see tests/foreign/qemu11.py).

    python tests/bench/vfio_user_io.py [--rounds 7] [--poll 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.foreign import qemu, qemu11  # noqa: E402
from tests.foreign.qemu_serve import Serve  # noqa: E402

DISK = 512 << 20
#: name -> (dd's words but the disk, blocks, unit, target)
WORK = {
    "read 4k": ("if={disk} of=/dev/null bs=4k count=8000 iflag=direct", 8000, "/s", 0.9),
    "write 4k": ("if=/dev/zero of={disk} bs=4k count=8000 oflag=direct", 8000, "/s", 0.9),
    "read 1M": ("if={disk} of=/dev/null bs=1M count=512 iflag=direct", 512, "MiB/s", 0.8),
    "write 1M": ("if=/dev/zero of={disk} bs=1M count=512 oflag=direct", 512, "MiB/s", 0.8),
}
FIND = "for each in /sys/block/vd*; do echo $(cat $each/serial) /dev/${each##*/}; done"


def rate(guest: qemu.Linux, disk: str, work: str) -> float:
    """Blocks per second of one run of dd."""
    words, blocks, _, _ = WORK[work]
    clock = "read up _ < /proc/uptime; echo $up"
    begin, end = guest.run(f"{clock}; dd {words.format(disk=disk)} 2>/dev/null; {clock}").splitlines()
    return blocks / (float(end) - float(begin))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--poll", type=int, default=0, help="for qvm serve, microseconds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    newer = qemu11.obtain()
    samples: dict[str, dict[str, list[float]]] = {work: {"qvm": [], "qemu": []} for work in WORK}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in ("ours.img", "theirs.img"):
            (folder / each).write_bytes(os.urandom(1 << 20) * (DISK >> 20))
        text = '[[vdev]]\ntype = "virtio-blk"\nname = "qvm"\nhostdev = "ours.img"\nserial = "qvm"\n'
        serve = Serve(folder, text, "vfio-user", "--poll", str(arguments.poll))
        socket = json.dumps(
            {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(serve.socket("qvm"))}}
        )
        devices = [
            "-drive", f"if=none,id=d,format=raw,file={folder / 'theirs.img'}",
            "-device", "virtio-blk-pci,drive=d,serial=qemu,disable-legacy=on",
            "-device", socket,
        ]  # fmt: skip
        try:
            guest = qemu.Linux(devices, qemu=newer.command, environment=newer.environment)
            try:
                disks = dict(line.split() for line in guest.run(FIND).splitlines())
                for number in range(arguments.rounds):
                    for work, rates in samples.items():
                        for who in ("qvm", "qemu") if number % 2 else ("qemu", "qvm"):
                            rates[who].append(rate(guest, disks[who], work))
            finally:
                guest.close()
        finally:
            serve.close()
    if arguments.json:
        print(json.dumps(samples))
        return
    for work, (_, _, unit, target) in WORK.items():
        medians = {who: statistics.median(rates) for who, rates in samples[work].items()}
        print(
            f"{work:9} qvm {medians['qvm']:7,.0f} {unit}, qemu {medians['qemu']:7,.0f} {unit}; "
            f"ratio {medians['qvm'] / medians['qemu']:.2f}  (target >= {target})"
        )


if __name__ == "__main__":
    main()
