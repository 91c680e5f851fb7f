"""A quarantined device of the machine is quiesced by hand, though its keeper has its IOMMU group."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qvm_quiesce import state as files
from qvm_vfio.errors import VfioError
from qvm_vfio.hardware import open_device

from tests.rig.inside.devices import bound, gone, masters
from tests.rig.inside.physical import Frames, Owner
from tests.rig.inside.vfio_owner import Memory, wait_for

KIND = "e1000e"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where guard and command keep records."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return files.folder()


@pytest.fixture
def keeper(state: Path) -> Iterator[Owner]:
    """An owner that was killed while somebody else wrote to the device's memory: it seems not quiet."""
    frames = Frames()
    them = Owner([KIND], guard=state)
    over = threading.Event()
    thread = threading.Thread(target=write, args=(them.memory[KIND], over))
    thread.start()
    them.process.kill()
    them.process.wait()
    wait_for(lambda: any(files.records(state)), "the record")
    over.set()
    thread.join()
    assert list(files.quarantined(state)) == [bound(KIND)]
    yield them
    them.close()
    frames.close()


def write(memory: Memory, over: threading.Event) -> None:
    number = 0
    while not over.wait(0.01):
        number += 1
        memory.map[-8:] = number.to_bytes(8, "little")


def run(*words: str) -> Any:
    command = [sys.executable, "-m", "qvmcore", "quiesce", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_run_asks_the_keeper_for_the_device(keeper: Owner, state: Path) -> None:
    with pytest.raises(VfioError, match=f"in use by process {keeper.guard}"):
        open_device(bound(KIND))
    done = run("run", bound(KIND))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "QUIESCED" in done.stdout
    assert not masters(KIND)
    assert not files.quarantined(state)
    wait_for(partial(gone, keeper.guard), "the end of the keeper")
    open_device(bound(KIND)).close()
    assert os.listdir(state / "quarantine") == []
