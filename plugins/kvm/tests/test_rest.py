"""Pause, resume, stop: a vCPU at rest stands between two instructions, and nobody waits for ever."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

#: Counts in rax and at 0x8000; between two instructions they differ by 0 or 1.
COUNTING = """
10000 31c0  xor %eax,%eax
10002 48ffc0  inc %rax
10005 4889042500800000  mov %rax,0x8000
1000d ebf3  jmp 0x10002
"""

#: Counts in rcx, in the device, and at 0x8000.
KNOCKING = """
10000 bb000000c0  mov $0xc0000000,%ebx
10005 31c9  xor %ecx,%ecx
10007 48ffc1  inc %rcx
1000a 890b  mov %ecx,(%rbx)
1000c 48890c2500800000  mov %rcx,0x8000
10014 ebf1  jmp 0x10007
"""

IDLE = """
10000 e6e9  out %al,$0xe9
10002 f4  hlt
10003 ebfd  jmp 0x10002
"""


def test_pause_comes_between_two_instructions(bench: Any) -> None:
    bench.start(COUNTING)
    seen = []
    for _ in range(20):
        assert bench.wait(lambda: bench.word() > sum(seen[-1:]))
        assert bench.guest.pause(20)
        (registers,) = bench.guest.registers()
        seen.append(bench.word())
        assert registers["rax"] - seen[-1] in (0, 1)
        time.sleep(0.002)
        assert bench.word() == seen[-1]
        bench.guest.resume()
    assert seen == sorted(set(seen))


def test_pause_completes_an_access_under_way(bench: Any) -> None:
    bench.start(KNOCKING)
    for _ in range(20):
        before = bench.word()
        assert bench.wait(lambda before=before: bench.word() > before + 5)
        assert bench.guest.pause(20)
        (registers,) = bench.guest.registers()
        knocks = bench.accesses[-1][4]
        # At the store to the device (rip 0x1000a) it has not knocked yet, behind it it has, once.
        assert registers["rcx"] - knocks == (1 if registers["rip"] == 0x1000A else 0)
        assert knocks == len(bench.accesses)
        bench.guest.resume()


def test_pausing_twice_and_resuming_twice(bench: Any) -> None:
    bench.guest.resume()
    bench.start(COUNTING)
    assert bench.guest.pause(20)
    assert bench.guest.pause(0)
    bench.guest.resume()
    bench.guest.resume()
    before = bench.word()
    assert bench.wait(lambda: bench.word() > before)


def test_an_idle_guest_can_be_paused_and_stopped(bench: Any) -> None:
    bench.start(IDLE)
    assert bench.done.wait(20)
    assert bench.guest.pause(20)
    assert bench.guest.registers()[0]["rip"] in (0x10002, 0x10003)  # before or in the HLT
    assert bench.guest.stop(20)  # also out of a pause
    assert bench.guest.registers()[0]["rip"] in (0x10002, 0x10003)
    assert bench.ends == []


def test_a_guest_that_could_not_be_paused_runs_on(bench: Any) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hang(_offset: int, _size: int, _value: int) -> None:
        inside.set()
        leave.wait(60)

    bench.write = hang
    bench.start(KNOCKING)
    assert inside.wait(20)
    assert not bench.guest.pause(0.01)
    leave.set()
    assert bench.wait(lambda: len(bench.accesses) > 3)


def test_registers_of_a_running_vcpu_are_no_reason_to_wait(bench: Any) -> None:
    bench.start(IDLE)
    assert bench.done.wait(20)
    assert bench.guest.pause(20)
    known = bench.guest.registers()
    bench.guest.resume()
    assert bench.wait(lambda: not bench.guest.status()["vcpus"][0]["paused"])
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(bench.guest.registers()), daemon=True)
    asking.start()
    asking.join(20)
    assert answers == [known]


def test_a_handler_that_hangs_does_not_hold_up_pause_and_stop(bench: Any) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hang(_offset: int, _size: int, _value: int) -> None:
        inside.set()
        leave.wait(60)

    bench.write = hang
    bench.start(KNOCKING)
    assert inside.wait(20)
    assert not bench.guest.pause(0.01)
    assert len(bench.guest.registers()) == 1  # does not wait for the vCPU
    assert not bench.guest.stop(0.01)
    leave.set()
    assert bench.guest.stop(20)
    assert len(bench.accesses) == 1
    assert bench.ends == []


def test_a_handler_may_stop_the_guest(bench: Any) -> None:
    stopped = []
    bench.write = lambda _offset, _size, _value: stopped.append(bench.guest.stop(20))
    bench.start(KNOCKING)
    assert bench.wait(lambda: bool(stopped) and not bench.guest.status()["running"])
    assert stopped == [True]
    assert bench.ends == []


def test_a_handler_that_stops_the_guest_and_then_raises_is_no_end(bench: Any, caplog: Any) -> None:
    def fail(_offset: int, _size: int, _value: int) -> None:
        bench.guest.stop(20)
        raise ValueError("a broken vdev")

    bench.write = fail
    bench.start(KNOCKING)
    assert bench.wait(lambda: "a broken vdev" in caplog.text)
    assert bench.guest.stop(20)
    assert bench.ends == []


def test_python_sees_none_of_the_kicks(bench: Any) -> None:
    """Its handlers stay as they are, and still work."""
    seen: list[int] = []
    numbers = [signal.SIGUSR1, signal.SIGTERM]
    old = {number: signal.signal(number, lambda number, _frame: seen.append(number)) for number in numbers}
    try:
        bench.start(COUNTING)
        for _ in range(50):
            assert bench.guest.pause(20)
            bench.guest.resume()
        assert seen == []
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_a_vcpu_that_ends_while_it_is_waited_for_is_at_rest(bench: Any) -> None:
    """pause() returns as soon as the guest is gone, not when its time is up."""
    inside, leave, answers = threading.Event(), threading.Event(), []

    def end(_offset: int, _size: int, _value: int) -> None:
        inside.set()
        leave.wait(60)
        raise ValueError("a broken vdev")

    bench.write = end
    bench.start(KNOCKING)
    assert inside.wait(20)
    waiting = threading.Thread(target=lambda: answers.append(bench.guest.pause(3600)))
    waiting.start()
    leave.set()
    waiting.join(20)
    assert answers == [True]
    assert len(bench.ends) == 1
