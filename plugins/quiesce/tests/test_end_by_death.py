"""The VM process dies at every step of its life, whatever else goes wrong: a quiet device, nothing left.

The rest of the product, all ends that a process survives long enough to end in order, is in
``tests/unit/test_end_cross_product.py``.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("dying_machines.py")
#: The guest's driver has not started the device when these steps run.
EARLY = ("created", "configured", "starting")
#: The plan has dismissed the guard by then; its own record says that all is quiet.
AFTER = ("RELEASE", "terminate")
DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)


def lives(number: signal.Signals, folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), number.name], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", DEATHS, ids=lambda number: number.name)
def test_a_process_that_dies_at_any_step_leaves_a_quiet_device_and_nothing_else(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = lives(number, tmp_path)
    assert len(found) == 3 + 4 * 7, (
        "early steps alone; running, five phases and on_terminate with each other vdev"
    )
    for each in found:
        text = json.dumps(each)
        assert each["signal"] == number, text
        assert each["all processes ended"], text
        assert not each["mastering"] and each["writes afterwards"] == 0, text
        assert each["quarantined"] == [], text
        if each["step"] in ("created", "configured"):
            # Before the devices were attached: no guard, no record, and nothing has run.
            assert (each["started"], each["other processes"], each["records"]) == (False, [], []), text
            continue
        assert each["started"] is (each["step"] not in EARLY), text
        # The guard ends by itself and well; after the plan's FLUSH the VM itself has seen to that.
        assert each["other processes"] == ([] if each["step"] in AFTER else [0]), text
        by = "vm" if each["step"] in AFTER else "guard"
        assert each["records"] in ([[by, "QUIESCED"]], [["guard", "QUIESCED"], ["vm", "QUIESCED"]]), text
        assert {"unmapped", "reset", "revoked"} <= set(each["taken"]), text
    with capsys.disabled():
        print(f"\ndeaths by {number.name} x life-cycle steps x behaviours: {len(found)} combinations run")
