"""Runs the program of :mod:`qvm_emulator.program` in a real guest while interrupting it."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from qvm_emulator import program
from qvm_emulator.cpu import Cpu
from qvm_emulator.guest import EmulatedGuest
from qvm_emulator.program import Slot
from qvm_emulator.scratch import scratch_memory
from qvmcore.api import (
    AddressSpace,
    Controller,
    CpuEntry,
    GuestConfig,
    GuestEnd,
    IntrSpec,
    MmioHandler,
    Window,
)

GIC = Controller("gicv2", "gic", ((0x0800_0000, 0x1_0000), (0x0801_0000, 0x1_0000)), range(32, 96))
DEVICE = 0x0900_0000
DEVICE_VALUE = 0xABCD_0000
DEVICE_LINE = IntrSpec("gic", 40)
_POLL = 0.0001
#: Seconds: a trial takes hundredths of one; only a guest that hangs may be given up, not a host that is busy.
TIMEOUT = 30.0


@dataclass
class Result:
    """What happened: how the guest ended (None: it did not), its words, writes the device saw."""

    end: GuestEnd | None
    words: Mapping[Slot, int]
    pulses: int
    writes: list[tuple[int, int, int]] = field(default_factory=list)


def run_trial(
    cpu_class: type[Cpu],
    *,
    loops: int,
    patches: int,
    last_call: int = 0,
    timeout: float = TIMEOUT,
    kick: bool = True,
) -> Result:
    """Run the program once; ``loops`` and ``patches`` set its length, ``timeout`` is in seconds."""
    memory = scratch_memory(program.BASE, program.SIZE)
    memory.write(program.BASE, program.image())
    memory.write(program.TABLE, program.PAGE_TABLE)
    (dist, _), (cpu, _) = GIC.windows
    slots = (program.TABLE, dist, cpu, loops, patches, DEVICE, last_call)
    memory.write(program.SLOTS, struct.pack("<7Q", *slots))
    writes: list[tuple[int, int, int]] = []
    bus = AddressSpace()
    bus.insert(
        DEVICE,
        Window(0x1000),
        MmioHandler(
            lambda offset, _size: DEVICE_VALUE + offset,
            lambda offset, size, value: writes.append((offset, size, value)),
        ),
        "trial",
    )
    bus.freeze()
    done = threading.Event()
    ends: list[GuestEnd] = []

    def on_end(end: GuestEnd) -> None:
        ends.append(end)
        done.set()

    guest = EmulatedGuest(GuestConfig("aarch64", 1, memory, bus, (GIC,), on_end), cpu_class)
    line = guest.irq_line(DEVICE_LINE)
    guest.start(CpuEntry(program.BASE, {"x0": program.SLOTS}))
    deadline = time.monotonic() + timeout
    pulses = 0
    stage = memory.view(program.SLOTS + Slot.STAGE, 8)
    try:
        while not done.wait(_POLL) and time.monotonic() < deadline:
            if stage[0] == program.COUNTING:
                line.pulse()
                pulses += 1
                if kick:
                    guest.kick()
    finally:
        # Also when nobody wants to wait for it any more: nothing runs on, nothing is left open.
        stage.release()
        stopped = guest.stop(timeout)
        words = {slot: int.from_bytes(memory.read(program.SLOTS + slot, 8), "little") for slot in Slot}
        guest.close()
        if stopped:
            memory.close()
    return Result(ends[0] if ends and stopped else None, words, pulses, writes)
