"""Interrupts of each kind: every one that was raised is taken, once."""

from __future__ import annotations

from typing import Any

import pytest

from plugins.kvm.tests.conftest import PORT, SHARED, NewPc, Pc
from qvmcore.api import EngineError, IntrSpec, MmioHandler, Window

COUNT = 200
MSI = 0xFEE0_0000
IRET = {"protected32": "iret_32", "long64": "iretq"}


def program(setup: str, *, mode: str = "long64", body: str = "hlt", handler: str = "") -> str:
    """Say R when ready, then go round ``body``; ``h`` counts into the first shared word."""
    return f"""
        cli
        pics_off
        idt
        {setup}
        apic_on
        sti
        say     $0x52
1:      {body}
        jmp     1b
h:      incl    {SHARED}
        {handler}
        eoi
        {IRET[mode]}
"""


def started(pc: Pc, text: str, mode: str = "long64") -> Pc:
    """A guest that is ready for interrupts."""
    pc.start(text, mode)
    assert pc.wait_said(1), f"not ready; ends {pc.ends}"
    return pc


def status(pc: Pc) -> Any:
    """What the engine counts."""
    return pc.guest.status()


@pytest.mark.parametrize("body", ["hlt", "pause"])
@pytest.mark.parametrize("mode", ["protected32", "long64"])
def test_an_edge_of_an_ioapic_pin_is_one_write_to_an_irqfd(pc: Pc, mode: str, body: str) -> None:
    line = pc.guest.irq_line(IntrSpec("ioapic", 5))
    started(pc, program("gate 0x45, h; pin 5, 0x45", mode=mode, body=body), mode)
    for count in range(1, COUNT + 1):
        line.pulse()
        assert pc.wait_word(count), f"interrupt {count} was lost"
    assert pc.word() == COUNT
    assert status(pc)["irqfds"] == 1
    assert pc.exits == {"io": 1, "mmio": 0}


def test_each_level_is_served_and_then_silent(pc: Pc) -> None:
    """The handler's acknowledgement lowers the line, as that of a driver does.

    One interrupt each; kvm_pvm raises a level that was served a second time, with any VMM.
    """
    line = pc.guest.irq_line(IntrSpec("ioapic", 20))
    lowered: list[int] = []

    def acknowledge(_offset: int, _size: int, value: int) -> None:
        line.set(False)
        lowered.append(value)

    pc.ports.insert(0x400, Window(1), MmioHandler(lambda _o, _s: 0, acknowledge), "level")
    started(
        pc,
        program(
            "gate 0x54, h; pin 20, 0x54, 0x8000", handler="movw $0x400, %dx; movb $7, %al; outb %al, %dx"
        ),
    )
    for count in range(1, COUNT + 1):
        before = len(lowered)
        line.set(True)
        assert pc.wait(lambda: len(lowered) > before), f"level {count} was lost"  # noqa: B023
    assert not pc.wait(lambda: len(lowered) > 2 * COUNT, 0.1)
    assert COUNT <= pc.word() == len(lowered) <= 2 * COUNT
    assert status(pc)["irqfds"] == 0


def test_a_level_that_stays_interrupts_again_and_again(pc: Pc) -> None:
    line = pc.guest.irq_line(IntrSpec("ioapic", 20))
    started(pc, program("gate 0x54, h; pin 20, 0x54, 0x8000", body="pause"))
    line.set(True)
    assert pc.wait_word(50)
    line.set(False)


def test_a_masked_pin_is_silent(pc: Pc) -> None:
    line, other = (pc.guest.irq_line(IntrSpec("ioapic", pin)) for pin in (5, 6))
    started(pc, program("gate 0x45, bad; gate 0x46, h; pin 5, 0x10045; pin 6, 0x46") + "bad: say $0xbb; hlt")
    for count in range(1, 21):
        line.pulse()
        other.pulse()
        assert pc.wait_word(count)
    assert bytes(pc.said) == b"R"


def test_each_message_is_one_interrupt_by_one_route(pc: Pc) -> None:
    started(pc, program("gate 0x61, h; gate 0xe2, g") + f"g: incl {SHARED + 8}; eoi; iretq")
    for count in range(1, COUNT + 1):
        for index, data in enumerate((0x61, 0xE2)):
            pc.guest.signal_msi(MSI, data)
            assert pc.wait_word(count, index), f"message {count} of {data:#x} was lost"
    assert (pc.word(0), pc.word(1)) == (COUNT, COUNT)
    found = status(pc)
    assert (found["msi_routes"], found["irqfds"], found["msi_slow"]) == (2, 2, 0)
    assert pc.exits == {"io": 1, "mmio": 0}


def test_more_messages_than_routes_are_delivered_too(pc: Pc) -> None:
    """A guest that invents new ones costs no more than the fixed number of routes."""
    gates = ".set v, 0x20; .rept 224; gate v, h; .set v, v + 1; .endr"
    started(pc, program(gates))
    sent = 0
    for high in (0, 0x4000):  # the level bit means nothing for an edge, but it is another message
        for vector in range(0x20, 0x100):
            pc.guest.signal_msi(MSI, high | vector)
            sent += 1
            assert pc.wait_word(sent), f"message {high | vector:#x} was lost"
    assert pc.word() == 448
    found = status(pc)
    assert 0 < found["msi_routes"] < 448
    assert found["msi_slow"] == 448 - found["msi_routes"]


def test_what_is_no_message_is_dropped(pc: Pc) -> None:
    started(
        pc, program(".set v, 0x20; .rept 224; gate v, bad; .set v, v + 1; .endr; gate 0x61, h") + "bad: hlt"
    )
    for address in (0, 0xFEC0_0000, MSI - 4, MSI + 0x10_0000, MSI | 1 << 32, (1 << 64) - 4):
        pc.guest.signal_msi(address, 0x62)
    for data in (0x62 | 1 << 31, 0, 0x0F):  # vectors below 16 are no interrupts
        pc.guest.signal_msi(MSI | 0x5000, data)  # there is no CPU 5
    pc.guest.signal_msi(MSI, 0x61)
    assert pc.wait_word(1)
    assert pc.ends == []


def test_a_vector_of_the_apic_as_a_line(pc: Pc) -> None:
    line = pc.guest.irq_line(IntrSpec("apic", 0x77))
    started(pc, program("gate 0x77, h"))
    for count in range(1, COUNT + 1):
        line.pulse()
        assert pc.wait_word(count)
    line.set(True)
    line.set(True)
    line.set(False)
    assert pc.wait_word(COUNT + 1)
    assert pc.word() == COUNT + 1


def test_each_shot_of_the_timer_is_one_interrupt(pc: Pc) -> None:
    """Mode 0 of the 8254's first counter, on pin 2; the guest starts the next shot in the handler."""
    shot = "movb $0x30, %al; outb %al, $0x43; movb $0, %al; outb %al, $0x40; movb $4, %al; outb %al, $0x40"
    started(
        pc,
        program(
            f"gate 0x42, h; pin 2, 0x42; {shot}",
            handler=f"cmpl $10, {SHARED}; jae 2f; {shot}; 2:",
        ),
    )
    assert pc.wait_word(10)
    assert not pc.wait(lambda: pc.word() > 10, 0.1)
    assert pc.exits == {"io": 1, "mmio": 0}


def test_the_periodic_timer_ticks_on(pc: Pc) -> None:
    """Mode 2, 1000 Hz."""
    start = (
        "movb $0x34, %al; outb %al, $0x43; movb $0xa9, %al; outb %al, $0x40; movb $4, %al; outb %al, $0x40"
    )
    started(pc, program(f"gate 0x42, h; pin 2, 0x42; {start}"))
    assert pc.wait_word(50)
    assert pc.exits == {"io": 1, "mmio": 0}


@pytest.mark.parametrize("number", [5, 12])
def test_a_line_reaches_a_guest_of_real_mode_by_the_8259(pc: Pc, number: int) -> None:
    """Both chips, at vectors 0x20 and 0x28."""
    mask = 0xFFFF & ~(1 << number) & ~(1 << 2)
    pc.start(
        f"""
        cli
        movw    ${SHARED >> 4:#x}, %ax
        movw    %ax, %fs
        .irp    pair, 0x1120, 0x11a0, 0x2021, 0x28a1, 0x0421, 0x02a1, 0x0121, 0x01a1
        movb    $(\\pair >> 8), %al
        outb    %al, $(\\pair & 0xff)
        .endr
        movb    ${mask & 0xFF:#x}, %al
        outb    %al, $0x21
        movb    ${mask >> 8:#x}, %al
        outb    %al, $0xa1
        gate    {0x20 + number:#x}, h
        sti
        say     $0x52
1:      hlt
        jmp     1b
h:      incl    %fs:0
        eoi8259
        iretw
        """,
        "real16",
    )
    line = pc.guest.irq_line(IntrSpec("ioapic", number))
    assert pc.wait_said(1)
    for count in range(1, 51):
        line.pulse()
        assert pc.wait_word(count), f"interrupt {count} was lost"
    assert pc.word() == 50


def test_an_interrupt_comes_through_while_the_guest_does_nothing_but_exits(pc: Pc) -> None:
    line = pc.guest.irq_line(IntrSpec("ioapic", 5))
    started(pc, program("gate 0x45, h; pin 5, 0x45", body=f"movw ${PORT:#x}, %dx; outb %al, %dx"))
    for count in range(1, 101):
        line.pulse()
        assert pc.wait_word(count), f"interrupt {count} was lost"
    assert pc.word() == 100


@pytest.mark.parametrize(
    "name", ["ioapic:0", "ioapic:2", "ioapic:24", "apic:31", "apic:256", "pic:5", "gic:41"]
)
def test_an_interrupt_that_is_none_is_refused(new_pc: NewPc, name: str) -> None:
    """Pins 0 and 2 are the timer's."""
    with pytest.raises(EngineError, match=name):
        new_pc().guest.irq_line(IntrSpec.parse(name))
