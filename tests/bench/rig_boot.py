#!/usr/bin/env python3
"""Boot to userspace on KVM, qvm against QEMU, by turns in one run of the rig (see tests/rig).

Same kernel, initramfs, command line, one CPU, 256 MiB and a virtio disk on PCI. The rig's machine is
itself emulated, so the ratio counts, not the seconds. Firmware is part of QEMU's way to a kernel.

    python tests/bench/rig_boot.py [--runs 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qvm_guests.progress import Progress  # noqa: E402

from tests.rig import machine  # noqa: E402
from tests.rig.results import Results, Silence  # noqa: E402

TEST = "tests/rig/inside/bench_boot.py::test_boot_times"
#: qvm's median by QEMU's.
TARGET = 1.3


def main() -> int:
    """Run it and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        rig = machine.start(
            [TEST], Progress(), timeout=3600, environment={"QVM_RIG_RUNS": str(arguments.runs)}
        )
    except machine.UnusableError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        reports = list(Results(rig, patience=200.0 * (arguments.runs + 1)).of(TEST))
        failed = [report for report in reports if report["outcome"] != "passed"]
        if failed:
            print(json.dumps(failed, indent=1), file=sys.stderr)
            return 1
    except Silence as silence:
        print(f"{silence}\n{rig.tail()}", file=sys.stderr)
        return 1
    finally:
        rig.close()
    figures = summary(reports[-1]["user_properties"])
    if arguments.json:
        print(json.dumps(figures))
        return 0
    for name, row in figures["vmms"].items():
        print(
            f"{name:5} to userspace {row['total']:6.2f} s ({row['least']:.2f} to {row['most']:.2f}),"
            f" of this by the kernel's clock {row['kernel']:6.2f} s; {row['stalled']} stalled"
        )
    for what in ("total", "kernel"):
        print(f"ratio, {what}: {figures['ratio'][what]:.2f}")
    print(f"target, total: {TARGET}; medians of {arguments.runs} runs")
    return 0


def summary(measured: list[tuple[str, tuple[float, float]]]) -> dict[str, Any]:
    """Medians by VMM, and the ratios of qvm to QEMU."""
    times: dict[str, list[tuple[float, float]]] = {}
    for name, pair in measured:
        times.setdefault(name, []).append(pair)
    rows = {
        name: {
            "stalled": sum(not kernel for _, kernel in pairs),
            "total": statistics.median(total for total, _ in pairs),
            "kernel": statistics.median(kernel for _, kernel in pairs),
            "least": min(total for total, _ in pairs),
            "most": max(total for total, _ in pairs),
        }
        for name, pairs in times.items()
    }
    ratio = {what: rows["qvm"][what] / rows["qemu"][what] for what in ("total", "kernel")}
    return {"vmms": rows, "ratio": ratio, "target": TARGET}


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
