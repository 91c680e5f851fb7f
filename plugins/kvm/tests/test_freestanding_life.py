"""Kicks, pause, stop, written pages, several guests: what a guest does must not matter to any of them."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from plugins.kvm.tests.conftest import HIGH_DEVICE, PORT, SHARED, NewPc, Pc
from qvmcore.api import CpuEntry, EngineError, GuestEnd, IntrSpec, MmioHandler, Reason, Window

#: What a guest may be doing; each says so first.
DOINGS = {
    "computes": f"cli; say $1; 1: incl {SHARED}; jmp 1b",
    "sleeps": "pics_off; sti; say $1; 1: hlt; jmp 1b",
    "sleeps for ever": "cli; say $1; 1: hlt; jmp 1b",
    "writes a device": f"movl ${HIGH_DEVICE:#x}, %ebx; say $1; 1: movl %ecx, (%rbx); jmp 1b",
    "reads a device": f"movl ${HIGH_DEVICE:#x}, %ebx; say $1; 1: movl (%rbx), %ecx; jmp 1b",
    "writes a port": f"movw ${PORT:#x}, %dx; say $1; 1: outb %al, %dx; jmp 1b",
    "moves strings": f"cld; say $1; 1: movw ${PORT:#x}, %dx; movl $0x4000, %esi; movl $4096, %ecx; rep outsb;"
    "jmp 1b",
}
every_doing = pytest.mark.parametrize("doing", DOINGS)


def started(pc: Pc, text: str) -> Pc:
    """A guest that has said its first byte."""
    pc.start(text)
    assert pc.wait_said(1)
    return pc


@every_doing
def test_it_stops_whatever_it_does(pc: Pc, doing: str) -> None:
    started(pc, DOINGS[doing])
    assert pc.guest.stop(10.0)
    assert pc.guest.status()["running"] is False
    assert pc.ends == []


@every_doing
def test_it_pauses_whatever_it_does_and_goes_on(pc: Pc, doing: str) -> None:
    image = pc.start(DOINGS[doing] + "; end:")
    assert pc.wait_said(1)
    for _ in range(20):
        assert pc.guest.pause(10.0)
        (registers,) = pc.guest.registers()
        assert image.labels["_start"] < registers["rip"] <= image.labels["end"]
        seen = len(pc.log), pc.word()
        time.sleep(0.001)
        assert (len(pc.log), pc.word()) == seen
        pc.guest.resume()
    if "sleeps" not in doing:
        assert pc.wait(lambda: (len(pc.log), pc.word()) > seen)


def test_a_paused_port_input_is_complete(pc: Pc) -> None:
    """An access under way is finished before the guest stands still, so registers have its value."""
    started(pc, f"movw ${PORT:#x}, %dx; say $1; 1: xorl %eax, %eax; inl %dx, %eax; movl %eax, %ecx; jmp 1b")
    for _ in range(30):
        assert pc.guest.pause(10.0)
        (registers,) = pc.guest.registers()
        assert registers["rax"] in (0, 0x44332211, 1) and registers["rcx"] in (0, 0x44332211)
        pc.guest.resume()


def test_only_who_is_kicked_is_interrupted(pc: Pc) -> None:
    """A run without requests costs no signals."""
    pc.run("movl $10000, %ecx; 1: loop 1b; through")
    (vcpu,) = pc.guest.status()["vcpus"]  # type: ignore[misc]
    assert vcpu["interrupted"] == 0  # type: ignore[index]


def test_pause_from_many_threads_at_once(pc: Pc) -> None:
    started(pc, DOINGS["computes"])
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(pc.guest.pause(10.0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    pc.guest.resume()
    before = pc.word()
    assert pc.wait(lambda: pc.word() > before)


def test_an_interrupt_of_a_paused_guest_comes_after_it(pc: Pc) -> None:
    line = pc.guest.irq_line(IntrSpec("ioapic", 5))
    handler = f"h: incl {SHARED}; eoi; iretq"
    started(pc, f"pics_off; idt; gate 0x45, h; pin 5, 0x45; apic_on; sti; say $1; 1: hlt; jmp 1b; {handler}")
    for count in range(1, 21):
        assert pc.guest.pause(10.0)
        line.pulse()
        time.sleep(0.001)
        assert pc.word() == count - 1
        pc.guest.resume()
        assert pc.wait_word(count)


@pytest.mark.parametrize("pages", [[0], [3, 5, 200], list(range(0, 256, 7))])
def test_written_pages_are_exactly_those_the_guest_wrote(pc: Pc, pages: list[int]) -> None:
    """From 1 MiB on; each page once, by a store of its own. Reads leave none."""
    base = 0x10_0000
    text = "".join(f"movb $1, {base + 0x1000 * page + page:#x}\n" for page in pages)
    region = pc.memory.regions[1]
    kvm = pc.guest
    kvm.log_dirty_pages()  # type: ignore[attr-defined]
    again = f"1: inb ${0x80}, %al; cmpb $1, %al; jne 1b; movb (0x110000), %al; say $2; through"
    answers = [0xFF]
    pc.ports.insert(0x80, Window(1), MmioHandler(lambda _o, _s: answers[-1], lambda *_: None), "go")
    pc.start(f"{text} say $1\n {again}")
    assert pc.wait_said(1)
    expected = [base + 0x1000 * page for page in pages]
    assert kvm.dirty_pages(region) == expected  # type: ignore[attr-defined]
    assert kvm.dirty_pages(region) == []  # type: ignore[attr-defined]
    answers.append(1)
    assert pc.through.wait(20)
    assert kvm.dirty_pages(region) == []  # type: ignore[attr-defined]


def test_written_pages_can_be_asked_while_the_guest_writes(pc: Pc) -> None:
    pc.guest.log_dirty_pages()  # type: ignore[attr-defined]
    started(pc, "movl $0x100000, %ebx; say $1; 1: incl (%rbx); jmp 1b")
    for _ in range(10):
        assert pc.wait(lambda: pc.guest.dirty_pages(pc.memory.regions[1]) == [0x10_0000])  # type: ignore[attr-defined]


def test_fifty_lives_leave_no_descriptor_and_no_thread(new_pc: NewPc) -> None:
    def life() -> None:
        pc = Pc()
        pc.guest.irq_line(IntrSpec("ioapic", 5)).pulse()
        pc.guest.signal_msi(0xFEE0_0000, 0x50)
        started(pc, DOINGS["computes"])
        pc.close()

    new_pc()  # skips without KVM; what is loaded once stays
    life()
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(50):
        life()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert threading.active_count() <= threads


def test_two_guests_run_at_once(new_pc: NewPc) -> None:
    """Each with its own memory, devices, interrupts and end."""
    one, two = new_pc(), new_pc()
    started(one, DOINGS["computes"])
    started(two, DOINGS["writes a device"])
    assert one.guest.pause(10.0)
    still = one.word()
    assert two.wait(lambda: len(two.log) > 100)
    assert (one.word(), one.log, two.word()) == (still, [], 0)
    one.guest.resume()
    assert two.guest.stop(10.0)
    two.guest.close()
    assert one.wait(lambda: one.word() > still)
    third = new_pc()
    third.run(f"movl $7, {SHARED}; through")
    assert third.word() == 7


def test_a_handler_that_hangs_stops_neither_the_other_cpu_nor_the_host(new_pc: NewPc) -> None:
    pc, release = new_pc(), threading.Event()
    entered = threading.Event()

    def hang(_offset: int, _size: int) -> int:
        entered.set()
        release.wait(20)
        return 0

    pc.ports.insert(0x400, Window(4), MmioHandler(hang, lambda *_: None), "hangs")
    pc.start("movw $0x400, %dx; inl %dx, %eax; 1: jmp 1b")
    assert entered.wait(20)
    assert not pc.guest.pause(0.05)
    assert not pc.guest.stop(0.05)
    pc.guest.close()  # refuses, and says so
    release.set()
    assert pc.guest.stop(10.0)


def test_an_exception_of_a_handler_is_the_end(pc: Pc) -> None:
    def broken(_offset: int, _size: int) -> int:
        raise RuntimeError("a device without a framework")

    pc.ports.insert(0x400, Window(4), MmioHandler(broken, lambda *_: None), "broken")
    pc.start("movw $0x400, %dx; inl %dx, %eax; 1: jmp 1b")
    assert pc.ended.wait(20)
    assert pc.ends == [
        GuestEnd(Reason.HOST_ERROR, "engine failure: RuntimeError: a device without a framework")
    ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (CpuEntry(0x2000, {}, ""), "real16"),
        (CpuEntry(0x2000, {}, "long64"), "gdt"),
        (CpuEntry(0x2000, {"gdt": 0x500}, "long64"), "cr3"),
        (CpuEntry(0x2000, {"x0": 1}, "real16"), "x0"),
    ],
)
def test_a_wrong_entry_is_refused_in_words(pc: Pc, entry: CpuEntry, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        pc.guest.start(entry)
