"""Interrupts: lines of the IOAPIC, vectors of the APIC, messages and their routes; counts are exact."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from qvm_kvm import irq

from plugins.kvm.tests.kvm_bench import APIC, one_by_one, put_handlers, taken
from qvmcore.api import EngineError, IntrSpec

#: Counts channel 0 of the PIT down once; IOAPIC pin 2 is vector 0x41.
TIMER = """
10000 0f011d3a000000  lidt 0x3a(%rip) # 0x10041
10007 bbf000e0fe  mov $0xfee000f0,%ebx
1000c c703ff010000  movl $0x1ff,(%rbx)
10012 bb0000c0fe  mov $0xfec00000,%ebx
10017 c70314000000  movl $0x14,(%rbx)
1001d c7431041000000  movl $0x41,0x10(%rbx)
10024 c70315000000  movl $0x15,(%rbx)
1002a c7431000000000  movl $0x0,0x10(%rbx)
10031 b030  mov $0x30,%al
10033 e643  out %al,$0x43
10035 b0ff  mov $0xff,%al
10037 e640  out %al,$0x40
10039 b001  mov $0x1,%al
1003b e640  out %al,$0x40
1003d fb  sti
1003e f4  hlt
1003f ebfd  jmp 0x1003e
10041 ff0f0000020000000000  IDTR: limit 0xfff, base 0x20000
1004b 50  push %rax
1004c b041  mov $0x41,%al
1004e e6e0  out %al,$0xe0
10050 b8b000e0fe  mov $0xfee000b0,%eax
10055 c70000000000  movl $0x0,(%rax)
1005b 58  pop %rax
1005c 48cf  iretq
"""

#: Sets up the first PIC from vector 0x40 on, input 5 unmasked.
PIC = """
10000 0f011d1a000000  lidt 0x1a(%rip) # 0x10021
10007 b011  mov $0x11,%al
10009 e620  out %al,$0x20
1000b b040  mov $0x40,%al
1000d e621  out %al,$0x21
1000f b004  mov $0x4,%al
10011 e621  out %al,$0x21
10013 b001  mov $0x1,%al
10015 e621  out %al,$0x21
10017 b0df  mov $0xdf,%al
10019 e621  out %al,$0x21
1001b fb  sti
1001c e6e9  out %al,$0xe9
1001e f4  hlt
1001f ebfd  jmp 0x1001e
10021 ff0f0000020000000000  IDTR: limit 0xfff, base 0x20000
1002b 50  push %rax
1002c b045  mov $0x45,%al
1002e e6e0  out %al,$0xe0
10030 b020  mov $0x20,%al
10032 e620  out %al,$0x20
10034 58  pop %rax
10035 48cf  iretq
"""


def test_an_edge_is_one_write_to_an_irqfd(ready: Any) -> None:
    line = ready.guest.irq_line(IntrSpec("ioapic", 5))
    assert ready.guest.status()["irqfds"] == 0
    one_by_one(ready, 0x41, 100, line.pulse)
    assert ready.guest.status()["irqfds"] == 1


def test_a_rising_level_on_an_edge_pin_is_one_interrupt(ready: Any) -> None:
    line = ready.guest.irq_line(IntrSpec("ioapic", 5))

    def cycle() -> None:
        line.set(True)
        line.set(True)
        line.set(False)

    one_by_one(ready, 0x41, 50, cycle)
    assert ready.guest.status()["irqfds"] == 0


def test_a_pulse_of_a_high_line_is_a_further_edge(ready: Any) -> None:
    line = ready.guest.irq_line(IntrSpec("ioapic", 5))
    line.pulse()
    assert ready.wait(lambda: taken(ready)[0x41] == 1)
    line.set(True)
    assert ready.wait(lambda: taken(ready)[0x41] == 2)
    line.pulse()
    assert ready.wait(lambda: taken(ready)[0x41] == 3)
    line.set(False)
    assert taken(ready) == {0x41: 3}


def test_a_level_interrupts_again_until_it_falls(ready: Any) -> None:
    line = ready.guest.irq_line(IntrSpec("ioapic", 6))
    seen = 0
    lowered: list[int] = []

    def lower(_offset: int, _size: int, _value: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            line.set(False)
            lowered.append(taken(ready)[0x42])

    ready.write = lower
    # The APIC of kvm_pvm ends an interrupt when it delivers it, so the line, still high, is pending again.
    extra = int(Path("/sys/module/kvm_pvm").exists())
    for number in range(1, 21):
        seen = 0
        line.set(True)
        assert ready.wait(lambda number=number: taken(ready)[0x42] >= (3 + extra) * number)
        assert len(lowered) == number
    one_by_one(ready, 0x40, 1, lambda: ready.guest.signal_msi(APIC, 0x40))
    assert taken(ready)[0x42] == (3 + extra) * 20


def test_the_timer_is_on_pin_2(bench: Any) -> None:
    put_handlers(bench, {0x41: 0x1004B})
    bench.start(TIMER)
    assert bench.wait(lambda: taken(bench) == {0x41: 1})
    assert bench.guest.status()["exits"] == {"io": 1, "mmio": 0}  # timer and controllers are KVM's


def test_a_line_reaches_the_pic_of_a_guest_that_uses_it(bench: Any) -> None:
    put_handlers(bench, {0x45: 0x1002B})
    bench.start(PIC)
    assert bench.done.wait(20)
    one_by_one(bench, 0x45, 20, bench.guest.irq_line(IntrSpec("ioapic", 5)).pulse)
    assert bench.ends == []


def test_apic_vector_is_a_message_to_the_first_cpu(ready: Any) -> None:
    line = ready.guest.irq_line(IntrSpec("apic", 0x40))
    one_by_one(ready, 0x40, 50, line.pulse)
    line.set(True)
    line.set(True)
    assert ready.wait(lambda: taken(ready)[0x40] == 51)
    line.set(False)
    line.set(True)
    assert ready.wait(lambda: taken(ready)[0x40] == 52)
    one_by_one(ready, 0x41, 1, lambda: ready.guest.signal_msi(APIC, 0x41))
    assert taken(ready)[0x40] == 52


def test_a_message_gets_one_route_and_is_one_write(ready: Any) -> None:
    one_by_one(ready, 0x40, 100, lambda: ready.guest.signal_msi(APIC, 0x40))
    status = ready.guest.status()
    assert (status["msi_routes"], status["irqfds"], status["msi_slow"]) == (1, 1, 0)


def test_messages_keep_their_routes_when_others_come(ready: Any) -> None:
    one_by_one(ready, 0x40, 1, lambda: ready.guest.signal_msi(APIC, 0x40))
    one_by_one(ready, 0x41, 1, lambda: ready.guest.signal_msi(APIC, 0x41))
    one_by_one(ready, 0x42, 1, lambda: ready.guest.signal_msi(APIC, 0x42))
    for vector in (0x40, 0x41, 0x42):
        ready.guest.signal_msi(APIC, vector)
        assert ready.wait(lambda vector=vector: taken(ready)[vector] == 2)
    assert ready.guest.status()["msi_routes"] == 3


def test_routes_are_bounded_and_further_messages_arrive_all_the_same(
    ready: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(irq, "MAX_ROUTES", 4)
    for page in range(10):
        ready.guest.signal_msi(APIC + 0xF0000, 0x50 + page)  # a CPU that is not there
    one_by_one(ready, 0x40, 20, lambda: ready.guest.signal_msi(APIC, 0x40))
    status = ready.guest.status()
    assert status["msi_routes"] == 4
    assert status["msi_slow"] + status["msi_refused"] == 6 + 20


def test_pins_still_work_after_routes_were_added(ready: Any) -> None:
    for vector in range(0x60, 0x70):
        ready.guest.signal_msi(APIC + 0xF0000, vector)
    one_by_one(ready, 0x41, 20, ready.guest.irq_line(IntrSpec("ioapic", 5)).pulse)


def test_without_descriptors_interrupts_take_the_slow_way(ready: Any) -> None:
    line = ready.guest.irq_line(IntrSpec("ioapic", 5))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        ready.guest.signal_msi(APIC, 0x40)
        line.pulse()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ready.wait(lambda: taken(ready) == {0x40: 1, 0x41: 1})
    assert ready.guest.status()["irqfds"] == 0


@pytest.mark.parametrize("address", [0, 0xFEDFFFFF, 0xFEF00000, 1 << 32 | APIC, (1 << 64) - 1])
def test_a_message_to_elsewhere_is_dropped(bench: Any, address: int) -> None:
    bench.guest.signal_msi(address, 0x40)
    assert bench.guest.status()["msi_routes"] == 0


def test_messages_of_no_sense_hurt_only_the_guest(ready: Any) -> None:
    """Also to a CPU that is not there, and of kinds that are reserved."""
    for data in (0, 0xFF, 0x100, 0x300, 0x600, 0xFFFF, 0xFFFFFFFF):
        ready.guest.signal_msi(APIC + 0xF0FFC, data)
    one_by_one(ready, 0x40, 10, lambda: ready.guest.signal_msi(APIC, 0x40))


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        ("gic", 41, "no interrupt gic:41; there are ioapic:1 to ioapic:23, apic:32 to apic:255"),
        ("ioapic", 24, "no interrupt ioapic:24"),
        ("apic", 31, "no interrupt apic:31"),
        ("pic", 3, "no interrupt pic:3"),
        ("ioapic", 2, "ioapic:2 cannot be a vdev's interrupt; pins 0 and 2 belong to the timer"),
    ],
)
def test_lines_that_are_not_there(bench: Any, name: str, number: int, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        bench.guest.irq_line(IntrSpec(name, number))


def test_a_late_signal_after_close_does_nothing(bench: Any) -> None:
    guest = bench.guest
    lines = [guest.irq_line(IntrSpec("ioapic", 5)), guest.irq_line(IntrSpec("apic", 0x40))]
    for line in lines:
        line.pulse()
    guest.close()
    for line in lines:
        line.pulse()
        line.set(True)
    guest.signal_msi(APIC, 0x41)
    assert guest.status()["irqfds"] == 0
