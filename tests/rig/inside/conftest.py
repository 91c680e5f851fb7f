"""Guests for the tests in the rig. Read outside as well, where these fixtures never run."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Vm
from tests.rig.inside import linux

Start = Callable[..., Vm]


def run_qvm(*words: object) -> Vm:
    """Start ``qvm run`` with these words."""
    command = [sys.executable, "-m", "qvmcore", "run", *map(str, words)]
    pipe = subprocess.PIPE
    return Vm(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT))


def finish(vm: Vm) -> None:
    """Whatever the test left running ends here."""
    if vm.process.poll() is None:
        vm.process.kill()
    vm.process.wait()
    for stream in (vm.process.stdin, vm.process.stdout):
        if stream is not None:
            stream.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(script, vdevs, cmdline=..., cpus=...)`` boots a guest that runs the script and powers off."""
    running: list[Vm] = []

    def begin(script: str, vdevs: str = "", *, cmdline: str = "", **system: Any) -> Vm:
        cmdline += " qvm.exec=" + base64.b64encode(script.encode()).decode()
        path = linux.machine(tmp_path / f"vm{len(running)}.toml", vdevs, cmdline=cmdline, **system)
        running.append(run_qvm(path))
        return running[-1]

    yield begin
    for vm in running:
        finish(vm)
