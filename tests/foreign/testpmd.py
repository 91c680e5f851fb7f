"""DPDK's virtio-user driver, by dpdk-testpmd: frames go round between two cards of ours."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROGRAM = "dpdk-testpmd"
#: Seconds until it has started, or ended.
LIMIT = 60.0


class Port(NamedTuple):
    """What a port has counted."""

    received: int
    sent: int
    errors: int


def forward(sockets: Sequence[Path], options: str, size: int, seconds: float) -> tuple[list[Port], str]:
    """Send bursts of frames of ``size`` bytes round for some seconds; the ports' counts, and all it said.

    ``options`` are those of the driver (``,packed_vq=1``). The ports are connected to each other by
    whoever serves them. AssertionError when it does not start.
    """
    devices = [
        f"--vdev=net_virtio_user{number},path={socket},queues=1,queue_size=256{options}"
        for number, socket in enumerate(sockets)
    ]
    words = [
        PROGRAM, "-l", "0,1", "--no-pci", "--no-huge", "-m", "256", "--no-telemetry",
        f"--file-prefix=qvm-{os.getpid()}", *devices,
        "--", "-i", "--txq=1", "--rxq=1", "--total-num-mbufs=4096",
    ]  # fmt: skip
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(f"set txpkts {size}\nstart tx_first\n")
            process.stdin.flush()
            time.sleep(seconds)
            said, _ = process.communicate("show port stats all\nstop\nquit\n", LIMIT)
        finally:
            process.kill()
    pattern = r"port \d+ +#+\s+RX-packets: (\d+).*?RX-errors: (\d+).*?TX-packets: (\d+).*?TX-errors: (\d+)"
    counts = [
        Port(int(received), int(sent), int(bad) + int(worse))
        for received, bad, sent, worse in re.findall(pattern, said, re.DOTALL)
    ]
    assert len(counts) == len(sockets), f"{PROGRAM} (exit {process.returncode}) said:\n{said}"
    return counts, said
