"""Every kind of exit, made by guests of a few instructions in 16, 32 and 64-bit mode."""

from __future__ import annotations

import pytest

from plugins.kvm.tests.conftest import HIGH_DEVICE, LOW_DEVICE, PATTERN, PORT, SHARED, Pc
from plugins.kvm.tests.guests.asm import MODES
from qvmcore.api import Reason
from qvmcore.bus import all_ones

REGISTERS = {1: "%al", 2: "%ax", 4: "%eax", 8: "%rax"}
SUFFIXES = {1: "b", 2: "w", 4: "l", 8: "q"}
every_mode = pytest.mark.parametrize("mode", MODES)


def segments(mode: str) -> str:
    """Make %es reach the device in the hole, and %fs the shared words; in flat modes all do."""
    if mode != "real16":
        return ""
    return f"movw ${LOW_DEVICE >> 4:#x}, %ax\n movw %ax, %es\n movw ${SHARED >> 4:#x}, %ax\n movw %ax, %fs\n"


def device(mode: str, offset: int) -> str:
    """An operand: the device in the hole."""
    return f"%es:{offset:#x}" if mode == "real16" else f"{LOW_DEVICE + offset:#x}"


def shared(mode: str, offset: int = 0) -> str:
    """An operand: the shared words."""
    return f"%fs:{offset:#x}" if mode == "real16" else f"{SHARED + offset:#x}"


@every_mode
@pytest.mark.parametrize("size", [1, 2, 4])
def test_port_output_and_input(pc: Pc, mode: str, size: int) -> None:
    register = REGISTERS[size]
    pc.run(
        f"""
        {segments(mode)}
        movl    $0xa5b6c7d8, %eax
        movw    ${PORT + 2:#x}, %dx
        out     {register}, %dx
        movw    ${PORT:#x}, %dx
        xorl    %eax, %eax
        in      %dx, {register}
        movl    %eax, {shared(mode)}
        through
        """,
        mode,
    )
    assert pc.log == [("port", 2, size, 0xA5B6C7D8 & all_ones(size)), ("port", 0, size, None)]
    assert pc.word() == PATTERN & all_ones(size)


@every_mode
@pytest.mark.parametrize("size", [1, 2, 4])
def test_string_output_and_input_arrive_element_by_element(pc: Pc, mode: str, size: int) -> None:
    count, suffix = 3000, SUFFIXES[size]
    data = bytes(n * 7 & 0xFF for n in range(count * size))
    pc.memory.write(0x4000, data)
    pc.run(
        f"""
        {"xorw %ax, %ax; movw %ax, %es" if mode == "real16" else ""}
        cld
        movw    ${PORT:#x}, %dx
        movl    $0x4000, %esi
        movl    ${count}, %ecx
        rep outs{suffix}
        movl    $0x8000, %edi
        movl    ${count}, %ecx
        rep ins{suffix}
        through
        """,
        mode,
    )
    written = [access[3] for access in pc.log[:count]]
    assert written == [int.from_bytes(data[n : n + size], "little") for n in range(0, len(data), size)]
    assert pc.log[count:] == [("port", 0, size, None)] * count
    assert pc.memory.read(0x8000, count * size) == (PATTERN & all_ones(size)).to_bytes(size, "little") * count


def test_string_output_backwards(pc: Pc) -> None:
    pc.memory.write(0x4000, b"backwards")
    pc.run(f"std; movw ${PORT:#x}, %dx; movl $0x4008, %esi; movl $9, %ecx; rep outsb; cld; through")
    assert bytes(access[3] or 0 for access in pc.log) == b"backwards"[::-1]


@pytest.mark.parametrize(
    ("mode", "size"), [*((mode, size) for mode in MODES for size in (1, 2, 4)), ("long64", 8)]
)
def test_loads_and_stores_of_a_device(pc: Pc, mode: str, size: int) -> None:
    register = REGISTERS[size]
    pc.run(
        f"""
        {segments(mode)}
        movl    $0xa5b6c7d8, %eax
        mov     {register}, {device(mode, 0x10)}
        xorl    %eax, %eax
        mov     {device(mode, 0x20)}, {register}
        movl    %eax, {shared(mode)}
        {f"mov %rax, {shared(mode)}" if size == 8 else ""}
        through
        """,
        mode,
    )
    assert pc.log == [("low", 0x10, size, 0xA5B6C7D8 & all_ones(size)), ("low", 0x20, size, None)]
    assert pc.word() == PATTERN & all_ones(size)


def test_a_device_above_ram(pc: Pc) -> None:
    pc.run(f"movl ${HIGH_DEVICE:#x}, %ebx; movl $1, 4(%rbx); movb 7(%rbx), %al; movb %al, {SHARED}; through")
    assert pc.log == [("high", 4, 4, 1), ("high", 7, 1, None)]
    assert pc.word() == 0x88


def test_read_modify_write_is_a_load_and_a_store(pc: Pc) -> None:
    pc.run(f"movl ${HIGH_DEVICE:#x}, %ebx; incl (%rbx); through")
    assert pc.log == [("high", 0, 4, None), ("high", 0, 4, (PATTERN & all_ones(4)) + 1)]


def test_a_string_move_to_a_device_is_a_store_each(pc: Pc) -> None:
    pc.memory.write(0x4000, b"move me!")
    pc.run(f"cld; movl ${HIGH_DEVICE:#x}, %edi; movl $0x4000, %esi; movl $4, %ecx; rep movsw; through")
    assert pc.log == [
        ("high", 2 * n, 2, int.from_bytes(b"move me!"[2 * n : 2 * n + 2], "little")) for n in range(4)
    ]


def test_an_access_across_two_pages_is_cut_where_they_meet(pc: Pc) -> None:
    """3 bytes of a store are in no window's access sizes, so nobody gets them; reads give all ones."""
    pc.run(
        f"""
        movl    ${HIGH_DEVICE + 0xFFD:#x}, %ebx
        mov     $0x1122334455667788, %rax
        mov     %rax, (%rbx)
        mov     (%rbx), %rax
        mov     %rax, {SHARED}
        through
        """
    )
    assert pc.log == []
    assert pc.unsupported == [
        (HIGH_DEVICE + 0xFFD, 3, 0x667788),
        (HIGH_DEVICE + 0x1000, 5, 0x1122334455),
        (HIGH_DEVICE + 0xFFD, 3, None),
        (HIGH_DEVICE + 0x1000, 5, None),
    ]
    assert pc.word() == all_ones(8)


@every_mode
def test_where_nothing_is_reads_all_ones(pc: Pc, mode: str) -> None:
    pc.run(
        f"""
        {segments(mode)}
        movl    $0, {device(mode, 0x1000)}
        movl    {device(mode, 0x1000)}, %eax
        movl    %eax, {shared(mode)}
        movw    $0x555, %dx
        outl    %eax, %dx
        inl     %dx, %eax
        movl    %eax, {shared(mode, 4)}
        through
        """,
        mode,
    )
    assert pc.word() == all_ones(8)
    assert pc.unsupported == [(LOW_DEVICE + 0x1000, 4, 0), (LOW_DEVICE + 0x1000, 4, None)]
    assert pc.log == []


def test_exits_are_counted_by_kind(pc: Pc) -> None:
    pc.run(
        f"""
        movl    ${HIGH_DEVICE:#x}, %ebx
        movl    $30, %ecx
1:      movl    %ecx, (%rbx)
        loop    1b
        movl    $20, %ecx
        movw    ${PORT:#x}, %dx
1:      outb    %al, %dx
        loop    1b
        through
        """
    )
    assert pc.exits["mmio"] == 30
    assert pc.exits["io"] == 20 + 1


@pytest.mark.parametrize("mode", ["protected32", "long64"])
def test_a_triple_fault_ends_the_guest(pc: Pc, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    pc.start("movl $0x12345, %ebx; lidt 1f; ud2; 1: .word 0; .quad 0", mode)
    assert pc.ended.wait(20)
    assert pc.guest.stop(5.0)
    (end,) = pc.ends
    assert (end.reason, end.code) == (Reason.GUEST_CRASH, 7)
    assert "triple fault" in end.message
    assert pc.exits["shutdown"] == 1
    assert "triple fault" in caplog.text


def test_what_kvm_cannot_emulate_ends_the_guest_with_registers_and_instruction(
    pc: Pc, caplog: pytest.LogCaptureFixture
) -> None:
    """An x87 load from a device, which no KVM emulates."""
    image = pc.start(f"movl $0x12345, %ecx; movl ${HIGH_DEVICE:#x}, %ebx; here: fildl 8(%rbx)")
    assert pc.ended.wait(20)
    assert pc.guest.stop(5.0)
    (end,) = pc.ends
    assert (end.reason, end.code) == (Reason.HOST_ERROR, 96)
    assert "internal error" in end.message
    assert f"rip {image.labels['here']:#x}" in end.message
    assert "db 43 08" in end.message
    assert "rcx=0x12345" in caplog.text and "db 43 08" in caplog.text
    assert pc.exits["internal-error"] == 1


def test_code_from_where_nothing_is_ends_the_guest_with_its_registers(
    pc: Pc, caplog: pytest.LogCaptureFixture
) -> None:
    """KVM cannot fetch instructions from a device: an internal error of it, or a fault of the guest."""
    pc.start(f"movl $0x12345, %ebx; movl ${HIGH_DEVICE + 0x2000:#x}, %eax; jmp *%rax")
    assert pc.ended.wait(20)
    assert pc.guest.stop(5.0)
    (end,) = pc.ends
    if "shutdown" in pc.exits:
        assert end.reason is Reason.GUEST_CRASH
    else:
        assert end.reason is Reason.HOST_ERROR
        assert "internal error" in end.message
    assert "rbx=0x12345" in caplog.text
