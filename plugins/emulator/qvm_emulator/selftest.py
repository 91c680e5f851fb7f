"""Whether fast mode works on this machine, with this build: asked before it is ever used.

A wrong guess about the inside of the core corrupts guests silently, so nothing is assumed: a small
guest runs in a scratch instance and every answer must be right. It takes a few hundredths of a second.
"""

from __future__ import annotations

import functools

from qvm_emulator import program
from qvm_emulator.program import Slot
from qvm_emulator.trial import DEVICE_VALUE, Result, run_trial
from qvmcore.api import EngineError, Reason

_LOOPS = 400_000
_PATCHES = 64
_LONGEST_LATENCY = 1 << 32  # ticks; only an absurd counter is an error, a busy machine is not


def problems(result: Result, loops: int) -> list[str]:
    """What is wrong with a run of the program; empty when everything is right."""
    if result.end is None:
        return [f"the test guest did not end; it was in stage {result.words[Slot.STAGE]}"]
    found = []
    if result.end.reason is not Reason.GUEST_SHUTDOWN:
        found.append(f"the test guest ended with {result.end.reason}: {result.end.message}")
    expected = {
        Slot.STAGE: 6,
        Slot.SVC_ESR: program.SVC_ESR,
        Slot.ABORT_ESR: program.ABORT_ESR,
        Slot.ABORT_FAR: program.ABORT_FAR,
        Slot.STALE: 0,
        Slot.COUNT: loops,
        Slot.VIRTUAL_TIMER_IRQS: program.SLEEPS,
        Slot.PHYSICAL_TIMER_IRQS: 1,
        Slot.MMIO_READ: DEVICE_VALUE + 4,
        Slot.UNMAPPED_READ: (1 << 64) - 1,
    }
    for slot, value in expected.items():
        if result.words[slot] != value:
            found.append(f"{slot.name} is {result.words[slot]:#x}, not {value:#x}")
    if not program.SLEEPS * program.TIMER_TICKS <= result.words[Slot.TICKS] < _LONGEST_LATENCY:
        found.append(f"ten timer sleeps took {result.words[Slot.TICKS]} ticks")
    if not 0 < result.words[Slot.DEVICE_IRQS] <= result.pulses:
        found.append(f"{result.pulses} interrupts raised, {result.words[Slot.DEVICE_IRQS]} taken")
    return found


@functools.cache
def fast_mode_problem() -> str:
    """Why fast mode must not be used here; empty when it may. Runs once a process."""
    from qvm_emulator.fast import FastCpu
    from qvm_emulator.internals import Unsuitable

    try:
        found = problems(run_trial(FastCpu, loops=_LOOPS, patches=_PATCHES), _LOOPS)
    except (Unsuitable, EngineError) as error:
        return str(error)
    return "self-test failed: " + "; ".join(found) if found else ""
