#!/usr/bin/env python3
"""Frames per second of virtio-net over vhost-user, with DPDK's testpmd sending them round.

Two cards of ours are connected by `peer`; two bursts of 32 frames go round between testpmd's two ports,
so each frame is transmitted by one card, crosses a Unix socket, and is received by the other.

    python tests/bench/testpmd_net.py [--seconds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.foreign.test_dpdk import CARDS  # noqa: E402
from tests.foreign.testpmd import forward  # noqa: E402

RINGS = {"split": "", "packed": ",packed_vq=1", "split, one buffer a frame": ",mrg_rxbuf=0"}
SIZES = (64, 1500)


def measure(options: str, size: int, seconds: float) -> float:
    """Frames per second that both ports received."""
    with tempfile.TemporaryDirectory(prefix="qvm-") as name:
        folder = Path(name)
        file = folder / "bench.toml"
        file.write_text(CARDS.format(cable=folder.name))
        words = [sys.executable, "-m", "qvmcore", "-q", "serve", str(file), "--vhost-user", name]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as server:
            sockets = [folder / "left.sock", folder / "right.sock"]
            while not all(socket.exists() for socket in sockets):
                time.sleep(0.05)
            try:
                ports, _ = forward(sockets, options, size, seconds)
            finally:
                server.terminate()
    return sum(port.received for port in ports) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rates = {
        f"{ring}, {size} bytes": measure(options, size, arguments.seconds)
        for ring, options in RINGS.items()
        for size in SIZES
    }
    if arguments.json:
        print(json.dumps(rates))
        return
    for name, rate in rates.items():
        print(f"{name:40} {rate:9,.0f} frames/s")


if __name__ == "__main__":
    main()
