"""Machines whose process dies, one after the other; a program of its own, run by test_end_by_death.py.

    python dying_machines.py FOLDER SIGNAL    prints a line of JSON for each death

Each machine is a child of this process, forked before there is any thread, with a simulated device that
lives on here: this process is the hardware. Orphans become its children too, so that nothing can be left
without being seen.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qvm_quiesce import plugin
from qvm_quiesce import state as files
from qvm_quiesce.simulated import SimulatedDevice, shared
from qvm_quiesce.vdev import QuiesceVdev

from qvmcore.api import GuestEnd, Phase, Vdev
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import machine

#: Where the process dies: while it is built, configured, started, runs, or in a phase of its end.
STEPS = ("created", "configured", "starting", "running", *(phase.name for phase in Phase), "terminate")
#: What another vdev does in the same phase, or as soon as the machine runs.
OTHERS = ("good", "raise", "hang", "late")
PR_SET_CHILD_SUBREAPER = 36
#: Seconds after which something is wrong, on however busy a host.
LIMIT = 60.0


class Passes(Vdev):
    vdev_type = "passes"
    physical = True
    device: SimulatedDevice

    def hardware(self) -> Sequence[SimulatedDevice]:
        return (self.device,)


class Other(Vdev):
    vdev_type = "other"
    mode = place = ""

    def on_configured(self) -> None:
        for phase in Phase:
            self.ctx.on_terminate(lambda end, p=phase: self.at(p.name), phase=phase)

    def on_starting(self) -> None:
        if self.place == "running":
            self.ctx.worker.call(lambda: self.at("running"))

    def at(self, place: str) -> None:
        if place == self.place and self.mode == "raise":
            raise RuntimeError("misbehaves")
        if place == self.place and self.mode in ("hang", "late"):
            time.sleep(60 if self.mode == "hang" else 0.01)


class Dies(Vdev):
    vdev_type = "dies"
    place = ""
    number = signal.SIGKILL

    def __init__(self, ctx: object, options: object) -> None:
        super().__init__(ctx, options)  # type: ignore[arg-type]
        self.at("created")

    def on_configured(self) -> None:
        for phase in Phase:
            self.ctx.on_terminate(lambda end, p=phase: self.at(p.name), phase=phase)
        self.at("configured")

    def on_starting(self) -> None:
        self.at("starting")

    def on_terminate(self, end: GuestEnd) -> None:
        self.at("terminate")

    def at(self, place: str) -> None:
        if place == self.place:
            os.kill(os.getpid(), self.number)
            time.sleep(60)


def script(guest: ScriptedGuest) -> None:
    Passes.device.start()
    while not Passes.device.written:
        time.sleep(0.001)
    if Dies.place == "running":
        os.kill(os.getpid(), Dies.number)
        time.sleep(60)
    guest.power_off()


def child(folder: Path) -> None:
    """One machine. Never returns."""
    logging.disable()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    options = {"quiesce": {"drain_deadline": 0.1, "reset_deadline": 0.5, "watch": 0.02}}
    try:
        vm = machine(
            (Passes, Other, Dies, QuiesceVdev),
            ScriptedEngine(script),
            folder,
            options=options,
            plugins=[plugin],
        )
        vm.run()
    finally:
        os._exit(99)  # it should have died


def until(holds: Callable[[], bool], device: SimulatedDevice) -> bool:
    """Be the hardware until something holds; whether it did in time."""
    end = time.monotonic() + LIMIT
    while not holds():
        if time.monotonic() > end:
            return False
        device.tick()
        time.sleep(0.001)
    return True


def die(folder: Path, step: str, other: str, number: signal.Signals) -> dict[str, Any]:
    """One death, and what is left of it."""
    folder.mkdir()
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    device = Passes.device = shared("0000:01:00.0")
    Dies.place, Dies.number, Other.place, Other.mode = step, number, step, other
    pid = os.fork()
    if pid == 0:
        child(folder)
    statuses: dict[int, int] = {}

    def all_reaped() -> bool:
        while True:
            try:
                gone, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if gone == 0:
                return False
            statuses[gone] = status

    ended = until(all_reaped, device)
    before = device.written
    quiet_until = time.monotonic() + 0.02
    until(lambda: time.monotonic() > quiet_until, device)
    bodies = [body for _, body in files.records()]
    for fd in device.handover().fds:
        os.close(fd)
    return {
        "step": step,
        "other": other,
        "signal": os.WTERMSIG(statuses.get(pid, 0)),
        "all processes ended": ended,
        "other processes": sorted(
            os.waitstatus_to_exitcode(each) for key, each in statuses.items() if key != pid
        ),
        "started": before > 0,
        "mastering": device.running,
        "writes afterwards": device.written - before,
        "taken": sorted(name for name, done in device.done.items() if done),
        "records": [[body["by"], body["verdict"]] for body in bodies if body is not None],
        "quarantined": list(files.quarantined()),
    }


def deaths() -> Iterator[tuple[str, str]]:
    """Every step with every other vdev; before the VM runs there is nothing another one could do."""
    for step, other in itertools.product(STEPS, OTHERS):
        if other == "good" or step not in ("created", "configured", "starting"):
            yield step, other


def main() -> None:
    folder, number = Path(sys.argv[1]), signal.Signals[sys.argv[2]]
    assert threading.active_count() == 1, "a fork takes no thread along"
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for count, (step, other) in enumerate(deaths()):
        print(json.dumps(die(folder / str(count), step, other, number)), flush=True)


if __name__ == "__main__":
    main()
