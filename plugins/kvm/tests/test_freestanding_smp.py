"""Several vCPUs: INIT and SIPI start each one, once; interrupts between them; pause and stop of all."""

from __future__ import annotations

from typing import Any

from plugins.kvm.tests.conftest import PORT, SHARED, NewPc, Pc

CPUS = 4
#: Page of the code the others start in; labels of the text below are 16-bit there.
AP = 0x3000
ICR_LOW, ICR_HIGH = 0xFEE0_0300, 0xFEE0_0310
#: Bytes at SHARED + 0x100 + APIC ID: what each CPU reports; words at SHARED + 0x200: its counter.
REPORTS, COUNTERS = SHARED + 0x100, SHARED + 0x200


def program(boot: str, others: str) -> str:
    """The boot CPU starts the others, which report and count themselves in the first shared word."""
    return f"""
        cli
        pics_off
        idt
        gate    0x70, h
        apic_on
        .irp    id, 1, 2, 3
        movl    $(\\id << 24), {ICR_HIGH}
        movl    $0x4500, {ICR_LOW}              # INIT
        movl    $(\\id << 24), {ICR_HIGH}
        movl    $({0x4600 | AP >> 12}), {ICR_LOW}       # SIPI: start at the page
        movl    $({0x4600 | AP >> 12}), {ICR_LOW}       # and again, as the manual says; it changes nothing
        .endr
        xorl    %ebx, %ebx
        jmp     boot

h:      lock incl {SHARED + 8}
        push    %eax
        push    %edx
        call    id
        incl    {COUNTERS}(,%eax,8)
        pop     %edx
        pop     %eax
        eoi
        iret_32_safe

id:     movl    0xfee00020, %eax
        shrl    $24, %eax
        ret

        .org    {AP - 0x2000:#x}
        .code16
        cli
        lgdtl   table
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $0x10, $flat
table:  .word   0x1f
        .long   0x500
        .code32
flat:   movw    $0x18, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        call_id
        movl    %eax, %ebx
        shll    $12, %eax
        leal    0x50000(%eax), %esp             # a stack for each
        movb    %bl, %al
        addb    $0xa0, %al
        movb    %al, {REPORTS}(%ebx)
        lock incl {SHARED}
        idt
        apic_on
        {others}
boot:   {boot}
"""


MACROS = """
        .macro  call_id
        movl    0xfee00020, %eax
        shrl    $24, %eax
        .endm
        .macro  iret_32_safe
        push    %eax
        push    %edx
        movl    16(%esp), %edx
        movl    8(%esp), %eax
        movl    %eax, 16(%esp)
        movl    %edx, 12(%esp)
        pop     %edx
        pop     %eax
        addl    $4, %esp
        popfl
        ret
        .endm
"""
SLEEP = "sti; 1: hlt; jmp 1b"
SPIN = f"1: incl {COUNTERS}(,%ebx,8); jmp 1b"


def start(new_pc: NewPc, boot: str, others: str) -> Pc:
    """Four CPUs of which three have been started by the first."""
    pc = new_pc(cpus=CPUS)
    pc.start(MACROS + program(boot, others), "protected32")
    assert pc.wait_word(CPUS - 1), f"{pc.word()} of 3 started; ends {pc.ends}"
    return pc


def counters(pc: Pc) -> list[int]:
    """What each CPU has counted."""
    return [pc.word((COUNTERS - SHARED) // 8 + index) for index in range(CPUS)]


def vcpus(pc: Pc) -> Any:
    """The engine's own words about each."""
    return pc.guest.status()["vcpus"]


def test_each_cpu_is_started_once_and_reports_its_own_number(new_pc: NewPc) -> None:
    pc = start(new_pc, SLEEP, SLEEP)
    assert pc.memory.read(REPORTS, CPUS) == bytes([0, 0xA1, 0xA2, 0xA3])
    assert not pc.wait(lambda: pc.word() > CPUS - 1, 0.05)
    assert [each["running"] for each in vcpus(pc)] == [True] * CPUS


def test_a_message_reaches_the_cpu_it_names(new_pc: NewPc) -> None:
    pc = start(new_pc, SLEEP, SLEEP)
    for turn in range(1, 21):
        for cpu in range(CPUS):
            pc.guest.signal_msi(0xFEE0_0000 | cpu << 12, 0x70)
            assert pc.wait(lambda cpu=cpu, turn=turn: counters(pc)[cpu] == turn)  # type: ignore[misc]
    assert counters(pc) == [20] * CPUS
    assert pc.word(1) == 20 * CPUS


def test_each_interrupt_of_a_cpu_to_all_others_is_taken_by_all(new_pc: NewPc) -> None:
    """Fixed delivery, all excluding self, one after the other has been taken by everyone."""
    rounds = 50
    send = f"""
        movl    ${rounds}, %ecx
2:      movl    {SHARED + 8}, %eax
        addl    $3, %eax
        movl    $0xc4070, {ICR_LOW}
3:      pause
        cmpl    %eax, {SHARED + 8}
        jne     3b
        loop    2b
        through
"""
    pc = start(new_pc, f"4: cmpl $3, {SHARED}; jne 4b; {send}", SLEEP)
    assert pc.through.wait(20), f"counted {counters(pc)}"
    assert counters(pc) == [0, rounds, rounds, rounds]


def test_all_cpus_pause_and_go_on(new_pc: NewPc) -> None:
    pc = start(new_pc, SPIN, SPIN)
    for _ in range(5):
        before = counters(pc)
        assert pc.wait(lambda before=before: all(a > b for a, b in zip(counters(pc), before, strict=True)))  # type: ignore[misc]
        assert pc.guest.pause(10.0)
        still = counters(pc)
        registers = pc.guest.registers()
        assert [each["rbx"] for each in registers] == list(range(CPUS))
        assert [each["paused"] for each in vcpus(pc)] == [True] * CPUS
        assert counters(pc) == still
        pc.guest.resume()


def test_a_cpu_that_was_never_started_pauses_and_stops(new_pc: NewPc) -> None:
    pc = new_pc(cpus=CPUS)
    pc.start(f"1: incl {SHARED}; jmp 1b", "protected32")
    assert pc.wait_word(1)
    assert pc.guest.pause(10.0)
    assert len(pc.guest.registers()) == CPUS
    pc.guest.resume()
    assert pc.guest.stop(10.0)


def test_a_triple_fault_of_one_cpu_stops_all(new_pc: NewPc) -> None:
    all_there = f"4: cmpl $3, {SHARED}; jne 4b"
    fault = f"{all_there}; cmpl $2, %ebx; jne 1f; lidt none; ud2; none: .word 0; .long 0"
    pc = start(new_pc, SPIN, f"{fault}; {SPIN}")
    assert pc.ended.wait(20)
    assert pc.guest.stop(10.0)
    assert len(pc.ends) == 1
    assert "triple fault (vCPU 2" in pc.ends[0].message
    assert [each["running"] for each in vcpus(pc)] == [False] * CPUS


def test_exits_of_all_cpus_are_answered_and_counted(new_pc: NewPc) -> None:
    count = 100
    touch = f"movw ${PORT:#x}, %dx; movl ${count}, %ecx; 2: outb %al, %dx; loop 2b; lock incl {SHARED + 16}"
    pc = start(new_pc, f"{touch}; {SLEEP}", f"{touch}; {SLEEP}")
    assert pc.wait_word(CPUS, 2)
    assert len(pc.log) == pc.exits["io"] == CPUS * count
    assert [each["exits"] for each in vcpus(pc)] == [count] * CPUS
