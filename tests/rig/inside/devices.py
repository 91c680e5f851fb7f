"""The functions of the rig's machine that tests take from it, and what is seen of them without VFIO."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from qvm_quiesce import pci
from qvm_quiesce import state as files

from tests.rig.inside.vfio_owner import find, wait_for

_FOUND: dict[str, str] = {}
_WHO = {"edu": (0x1234, 0x11E8, ""), "e1000e": (0x8086, 0x10D3, ""), "plain": (0, 0, "plain"),
        "slow": (0, 0, "slow"), "line": (0, 0, "line")}  # fmt: skip


def bound(which: str) -> str:
    """The name of one of the functions to pass, bound to vfio-pci as a user binds it."""
    if which not in _FOUND:
        _FOUND[which] = find(*_WHO[which])
        command = [sys.executable, "-m", "qvm_vfio", "bind", _FOUND[which]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return _FOUND[which]


def masters(which: str) -> bool:
    """Bus mastering, without VFIO, as lspci sees it."""
    config = Path(f"/sys/bus/pci/devices/{bound(which)}/config").read_bytes()
    return bool(int.from_bytes(config[4:6], "little") & pci.COMMAND_BUS_MASTER)


def until_off(which: str, began: float, limit: float = 60.0) -> float:
    """Wait until bus mastering is off; the milliseconds since ``began``."""
    while masters(which):
        assert time.monotonic() < began + limit, f"{which} masters the bus"
        time.sleep(0.0005)
    return (time.monotonic() - began) * 1e3


def guard_s_record() -> None:
    """The guard has proven the device quiet, and is gone."""
    wait_for(lambda: any(files.records()), "the guard's record")
    body = next(files.records())[1]
    assert body is not None
    assert (body["by"], body["verdict"]) == ("guard", "QUIESCED"), body


def gone(pid: int) -> bool:
    """Whether a process is no more, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
