"""Guests in both modes: traps, interrupts, WFI, MMIO, stop, end."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from qvm_emulator.cpu import Cpu
from qvm_emulator.psci import Function
from qvm_emulator.selftest import problems
from qvm_emulator.timer import TimerChannel
from qvm_emulator.trial import run_trial

from qvmcore.api import CpuEntry, EngineError, IntrSpec, Reason

POWER_OFF = """
200 d2b08000  mov x0, #0x84000000
204 91002000  add x0, x0, #0x8
208 d4000002  hvc #0x0
20c 14000000  b .
"""

ROM = (
    """
000 d2a20001  mov x1, #0x10000000
004 d2824682  mov x2, #0x1234
008 f9000422  str x2, [x1, #8]
00c f9400023  ldr x3, [x1]
010 f9400424  ldr x4, [x1, #8]
014 f9000003  str x3, [x0]
018 f9000404  str x4, [x0, #8]
01c 14000079  b 200
"""
    + POWER_OFF
)

NOTHING_THERE = (
    """
000 d2c10001  mov x1, #0x80000000000
004 f9400022  ldr x2, [x1]
008 f9000002  str x2, [x0]
00c f9000022  str x2, [x1]
010 1400007c  b 200
"""
    + POWER_OFF
)

IDLE = """
000 d503207f  wfi
004 17ffffff  b 000
"""

# Jumps to where nothing is: an endless loop of exceptions, as there are no vectors either.
WEDGED = """
000 d2a14001  mov x1, #0xa000000
004 d61f0020  br x1
"""

SECURE_CALL = """
000 d4000003  smc #0x0
"""

DEVICE_READ = """
000 d2a12001  mov x1, #0x9000000
004 b9400822  ldr w2, [x1, #8]
008 17fffffe  b 000
"""

# Nothing but system calls, while interrupts arrive: x0[20] counts them.
STORM = """
000 aa0003f3  mov x19, x0
004 10003fe1  adr x1, 800
008 d518c001  msr vbar_el1, x1
00c d2a1001b  mov x27, #0x8000000
010 9140437c  add x28, x27, #0x10, lsl #12
014 12800001  mov w1, #0xffffffff
018 b9010761  str w1, [x27, #260]
01c 52800021  mov w1, #0x1
020 b9000361  str w1, [x27]
024 52801fe2  mov w2, #0xff
028 b9000782  str w2, [x28, #4]
02c b9000381  str w1, [x28]
030 d50342ff  msr daifclr, #0x2
034 d4000001  svc #0x0
038 17ffffff  b 034
03c b9400f81  ldr w1, [x28, #12]
040 710ff03f  cmp w1, #0x3fc
044 540000a2  b.cs 058
048 f9405262  ldr x2, [x19, #160]
04c 91000442  add x2, x2, #0x1
050 f9005262  str x2, [x19, #160]
054 b9001381  str w1, [x28, #16]
058 d69f03e0  eret
a00 d69f03e0  eret
a80 17fffd6f  b 03c
"""


#: Counts in x1 and in the first word of its data; between two instructions they differ by 0 or 1.
COUNTING = """
000 f9400001  ldr x1, [x0]
004 91000421  add x1, x1, #1
008 f9000001  str x1, [x0]
00c 17fffffd  b 000
"""


@pytest.mark.parametrize("seed", range(3))
def test_the_whole_program(cpu_class: type[Cpu], seed: int) -> None:
    loops = 300_000 + seed
    result = run_trial(cpu_class, loops=loops, patches=300)
    assert problems(result, loops) == []
    assert result.writes == [(0, 4, 0x5A)]
    assert result.pulses > 0


@pytest.mark.parametrize(
    ("call", "reason"),
    [(Function.SYSTEM_OFF, Reason.GUEST_SHUTDOWN), (Function.SYSTEM_RESET, Reason.GUEST_RESET)],
)
def test_psci_ends_the_guest(cpu_class: type[Cpu], call: Function, reason: Reason) -> None:
    result = run_trial(cpu_class, loops=10, patches=1, last_call=call, kick=False)
    assert result.end is not None
    assert result.end.reason is reason


def test_rom_keeps_its_bytes(bench: Any) -> None:
    bench.memory.write(0x1000_0000, b"read-only bytes!")
    bench.start(ROM)
    assert bench.ended.wait(20)
    assert (bench.word(0), bench.word(1)) == tuple(
        int.from_bytes(part, "little") for part in (b"read-onl", b"y bytes!")
    )


def test_where_nothing_is_reads_all_ones(bench: Any) -> None:
    bench.start(NOTHING_THERE)
    assert bench.ended.wait(20)
    assert bench.word(0) == (1 << 64) - 1
    assert bench.unsupported[0][0] == 0x800_0000_0000


@pytest.mark.parametrize("listing", [WEDGED, SECURE_CALL], ids=["no code", "smc without vectors"])
def test_wedged_guest_can_be_stopped(bench: Any, listing: str) -> None:
    bench.start(listing)
    assert not bench.ended.wait(0.1)
    assert bench.guest.stop(5.0)
    assert bench.guest.stop(0.0)
    assert bench.ends == []


def test_idle_guest_uses_no_cpu(bench: Any) -> None:
    bench.start(IDLE)
    assert bench.wait(lambda: bench.guest.status()["halted"])
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.1
    assert bench.guest.status()["halts"] < 2_000


def test_pulse_wakes_a_sleeping_guest(bench: Any) -> None:
    bench.start(STORM.replace("034 d4000001  svc #0x0", "034 d503207f  wfi"))
    line = bench.guest.irq_line(IntrSpec("gic", 40))
    for count in range(1, 101):
        assert bench.wait(lambda: bench.guest.status()["halted"])
        line.pulse()
        assert bench.wait(lambda count=count: bench.word(20) >= count)
    assert bench.word(20) == 100


def test_no_interrupt_is_lost_among_exceptions(bench: Any) -> None:
    bench.start(STORM)
    line = bench.guest.irq_line(IntrSpec("gic", 40))
    for count in range(1, 1_001):
        line.pulse()
        assert bench.wait(lambda count=count: bench.word(20) >= count), f"interrupt {count} was lost"


def test_level_line_interrupts_until_lowered(bench: Any) -> None:
    bench.start(STORM)
    line = bench.guest.irq_line(IntrSpec("gic", 41))
    line.set(True)
    assert bench.wait(lambda: bench.word(20) >= 50)
    line.set(False)
    assert bench.wait(lambda: not bench.guest._gic.asserted)


def test_other_threads_run_while_the_guest_computes(bench: Any) -> None:
    bench.start("000 14000000  b .")
    ran = 0
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        ran += 1
    assert ran > 10_000


def test_exception_in_a_handler_ends_the_guest(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_offset: int, _size: int) -> int:
        raise RuntimeError("broken device")

    bench.read = broken
    bench.start(DEVICE_READ)
    assert bench.ended.wait(20)
    assert bench.ends[0].reason is Reason.HOST_ERROR
    assert "broken device" in bench.ends[0].message
    assert "broken device" in caplog.text


def test_exception_in_a_system_register_ends_the_guest(
    cpu_class: type[Cpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_timer: TimerChannel, _value: int) -> None:
        raise RuntimeError("broken timer")

    monkeypatch.setattr(TimerChannel, "write_control", broken)
    result = run_trial(cpu_class, loops=10, patches=1)
    assert result.end is not None
    assert result.end.reason is Reason.HOST_ERROR
    assert "broken timer" in result.end.message


def test_handler_may_end_the_guest_from_the_vcpu_thread(bench: Any) -> None:
    def stop(_offset: int, _size: int) -> int:
        bench.guest.stop(1.0)
        return 0

    bench.read = stop
    bench.start(DEVICE_READ)
    assert bench.wait(lambda: not bench.guest.status()["running"])
    assert bench.ends == []


def test_blocked_handler_makes_stop_time_out(bench: Any) -> None:
    entered, release = threading.Event(), threading.Event()

    def block(_offset: int, _size: int) -> int:
        entered.set()
        release.wait(20)
        return 0

    bench.read = block
    bench.start(DEVICE_READ)
    assert entered.wait(20)
    assert not bench.guest.stop(0.05)
    release.set()
    assert bench.guest.stop(5.0)


def test_registers_and_refusals(bench: Any) -> None:
    bench.start(IDLE)
    assert bench.wait(lambda: bench.guest.status()["halted"])
    with pytest.raises(EngineError, match="started already"):
        bench.guest.start(CpuEntry(0))
    with pytest.raises(EngineError, match="no interrupt gic:5"):
        bench.guest.irq_line(IntrSpec("gic", 5))
    with pytest.raises(EngineError, match="no interrupt apic:40"):
        bench.guest.irq_line(IntrSpec("apic", 40))
    assert bench.guest.stop(5.0)
    (registers,) = bench.guest.registers()
    assert registers["pc"] == 0x4000_0004
    assert registers["x0"] == 0x4000_8000
    assert registers["pstate"] & 0xF == 5


def test_unknown_register_is_refused(bench: Any) -> None:
    with pytest.raises(EngineError, match="no register 'rax'"):
        bench.guest.start(CpuEntry(0, {"rax": 1}))


def test_a_paused_guest_stands_still_between_two_instructions_and_goes_on(bench: Any) -> None:
    bench.start(COUNTING)
    for _ in range(20):
        assert bench.guest.pause(5.0)
        (registers,) = bench.guest.registers()
        count = bench.word(0)
        assert registers["x1"] - count in (0, 1)
        assert bench.word(0) == count
        bench.guest.resume()
        assert bench.wait(lambda before=count: bench.word(0) > before)
    assert bench.guest.pause(5.0)
    assert bench.guest.stop(5.0)


def test_a_sleeping_guest_can_be_paused_and_sleeps_again(bench: Any) -> None:
    bench.start(IDLE)
    assert bench.wait(lambda: bench.guest.status()["halted"])
    assert bench.guest.pause(5.0)
    assert not bench.guest.status()["halted"]
    bench.guest.resume()
    assert bench.wait(lambda: bench.guest.status()["halted"])
