"""Every way in which the owner of physical devices at work can end: its guard stops them.

Devices, kernel and IOMMU as in test_physical.py.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qvm_quiesce import state as files

from tests.rig.inside.devices import gone, masters
from tests.rig.inside.physical import KINDS, Faults, Frames, Owner, assert_unchanged
from tests.rig.inside.vfio_owner import wait_for

#: Owners that are ended in each way.
RUNS = 5


@pytest.fixture(scope="module", autouse=True)
def frames() -> Iterator[None]:
    """They come all the time."""
    sender = Frames()
    yield
    sender.close()


@pytest.fixture
def faults() -> Iterator[Faults]:
    listener = Faults()
    yield listener
    listener.close()


@pytest.fixture
def owner() -> Iterator[Any]:
    """``owner(kinds, ...)``: see Owner."""
    owners = []

    def begin(*words: Any, **options: Any) -> Owner:
        owners.append(Owner(*words, **options))
        return owners[-1]

    yield begin
    for each in owners:
        each.close()


def end(them: Owner, how: str) -> None:
    """End an owner in one of the ways; returns when it is dead."""
    if how in ("exit", "segv"):
        them.tell(how)
    else:
        them.process.send_signal(getattr(signal, how))
    them.process.wait()


ENDS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": -signal.SIGTERM, "segv": -signal.SIGSEGV, "exit": 7}


def mastering_ends(them: Owner, began: float) -> dict[str, float]:
    """When bus mastering of each device was seen off, in seconds after ``began``."""
    seen: dict[str, float] = {}
    while len(seen) < len(them.names):
        for kind in them.names:
            if kind not in seen and not masters(kind):
                seen[kind] = time.perf_counter() - began
        assert time.perf_counter() < began + 60, f"bus mastering went off for these only: {seen}"
    return seen


def recorded(state: Path) -> dict[str, Any]:
    """The evidence record the guard writes."""
    wait_for(lambda: any(files.records(state)), "the record")
    ((_, body),) = files.records(state)
    assert body is not None, "the record is damaged"
    return body


def told(body: dict[str, Any]) -> str:
    """A record, a line for each step."""
    return "\n".join(f"{each['device']} {step}" for each in body["devices"] for step in each["steps"])


@pytest.mark.parametrize("how", ENDS)
def test_a_guard_stops_the_devices_of_an_owner_that_ended(
    how: str, owner: Any, faults: Faults, tmp_path: Path
) -> None:
    """Each owner after the first also shows that a device which was quiesced works again."""
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    slowest: dict[str, float] = {}
    for run in range(RUNS):
        them = owner(KINDS, guard=tmp_path / str(run))
        began = time.perf_counter()
        end(them, how)
        assert them.process.returncode == ENDS[how]
        for kind, seconds in mastering_ends(them, began).items():
            took[kind].append(seconds)
        body = recorded(tmp_path / str(run))
        assert (body["by"], body["verdict"], body["keeper"]) == ("guard", "QUIESCED", 0), told(body)
        assert [each["device"] for each in body["devices"]] == list(them.names.values())
        for step in (step for each in body["devices"] for step in each["steps"]):
            slowest[step["step"]] = max(step["seconds"], slowest.get(step["step"], 0))
        assert_unchanged(*them.memory.values())
        assert files.quarantined(tmp_path / str(run)) == {}
        wait_for(partial(gone, them.guard), "the end of the guard")
    assert faults.lines() == []
    for kind, times in took.items():
        shown = f"median {statistics.median(times) * 1e3:.1f}, worst {max(times) * 1e3:.1f} ms"
        print(f"{how}, {kind}: from the end to bus mastering off, {RUNS} runs: {shown}")
    print("slowest of each step, ms:", *(f"{step} {seconds * 1e3:.0f}" for step, seconds in slowest.items()))


def test_a_guard_acts_however_much_memory_its_owner_had(owner: Any, tmp_path: Path) -> None:
    """The kernel frees it before it closes the dead process's files; the figure tells what that costs."""
    for ballast in (0, 512):
        took = []
        for run in range(RUNS):
            them = owner(["e1000e"], guard=tmp_path / f"{ballast}-{run}", ballast=ballast)
            began = time.perf_counter()
            them.process.kill()
            took.append(mastering_ends(them, began)["e1000e"] * 1e3)
            them.process.wait()
            body = recorded(tmp_path / f"{ballast}-{run}")
            assert (body["by"], body["verdict"]) == ("guard", "QUIESCED"), told(body)
            wait_for(partial(gone, them.guard), "the end of the guard")
        shown = f"median {statistics.median(took):.1f}, worst {max(took):.1f} ms"
        print(f"SIGKILL of an owner with {ballast} MiB: to bus mastering off: {shown}")


def test_a_guard_killed_with_its_owner_leaves_it_to_the_kernel(owner: Any, tmp_path: Path) -> None:
    """The last line: no record, but bus mastering is off when the last of them is gone."""
    them = owner(KINDS, guard=tmp_path)
    for pid in (them.guard, them.process.pid):
        os.kill(pid, signal.SIGKILL)
    them.process.wait()
    wait_for(lambda: not any(masters(kind) for kind in KINDS), "bus mastering off")
    assert_unchanged(*them.memory.values())
    assert list(files.records(tmp_path)) == []


def test_a_guard_is_not_ended_by_a_terminal_s_signals(owner: Any, tmp_path: Path) -> None:
    them = owner(["e1000e"], guard=tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(them.guard, number)
    end(them, "SIGKILL")
    body = recorded(tmp_path)
    assert body["verdict"] == "QUIESCED", told(body)
