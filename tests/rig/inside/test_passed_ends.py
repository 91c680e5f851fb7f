"""How a guest with a physical drive at work can end while its VMM lives: each time the drive is quiesced.

The drive is read all the time. That its VMM is killed as well is in test_pass.py.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from qvm_quiesce import pci
from qvm_quiesce import state as files

from tests.rig.inside import linux
from tests.rig.inside.conftest import Start
from tests.rig.inside.devices import bound, masters
from tests.rig.inside.test_ends import PANIC

REQUIRE = "\n[safety]\nrequire-quiesce = true\n"
QUIET = linux.vdev("quiesce", "quiet")
AT_WORK = (
    "while :; do dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct 2>/dev/null; done & sleep 3; echo work; "
)


def passed() -> str:
    return linux.vdev("pass", "drive", device=f"pci:{bound('plain')}")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records and quarantine go."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_require_quiesce_refuses_a_drive_that_nobody_quiesces(start: Start) -> None:
    vm = start("echo never", REQUIRE + passed())
    assert vm.wait(60) not in (0, 8), vm.text
    assert "[safety] require-quiesce: nobody quiesces" in vm.text
    assert 'type = "quiesce"' in vm.text
    assert "never" not in vm.text
    assert not masters("plain")


@pytest.mark.parametrize(
    ("script", "cmdline", "code", "ended"),
    [
        ("sleep 1000", "", 3, "sigquit"),
        (PANIC, "panic=-1", 0, "guest-reset"),
        (PANIC, "panic=-1 reboot=triple", 7, "guest-crash"),
        ("poweroff -f", "", 0, "guest-shutdown"),
    ],
    ids=["sigquit", "panic", "triple-fault", "power-off"],
)
def test_a_drive_at_work_is_quiesced(script: str, cmdline: str, code: int, ended: str, start: Start) -> None:
    vm = start(AT_WORK + script, REQUIRE + passed() + QUIET, cmdline=cmdline)
    vm.expect("work\n")
    assert masters("plain")
    if ended == "sigquit":
        vm.send(signal.SIGQUIT)
    assert vm.wait() == code, vm.text
    assert f"ended: {ended}" in vm.text
    assert "quiesce: QUIESCED" in vm.text
    assert not masters("plain")
    ((_, body),) = files.records()
    assert body is not None
    assert (body["by"], body["verdict"]) == ("vm", "QUIESCED")
    if ended != "guest-shutdown":  # that is where Linux stops its devices itself
        assert at_work(body), body


def at_work(body: dict[str, Any]) -> bool:
    """Whether the drive still mastered the bus when the quiesce began, by the record."""
    (device,) = body["devices"]
    first = next(text for step in device["steps"] for text in step["read"] if text.startswith("command="))
    return bool(int(first.removeprefix("command="), 16) & pci.COMMAND_BUS_MASTER)
