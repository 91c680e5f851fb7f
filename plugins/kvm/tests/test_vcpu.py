"""vCPUs: exits for ports and memory, start modes, ends, several of them."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import pytest

from qvmcore.api import CpuEntry, EngineError, MemorySpec, Reason

PORTS = """
10000 bae0000000  mov $0xe0,%edx
10005 b011  mov $0x11,%al
10007 ee  out %al,(%dx)
10008 66b82222  mov $0x2222,%ax
1000c 66ef  out %ax,(%dx)
1000e b833333333  mov $0x33333333,%eax
10013 ef  out %eax,(%dx)
10014 ec  in (%dx),%al
10015 88042500800000  mov %al,0x8000
1001c 66ed  in (%dx),%ax
1001e 6689042502800000  mov %ax,0x8002
10026 ed  in (%dx),%eax
10027 89042504800000  mov %eax,0x8004
1002e be00800000  mov $0x8000,%esi
10033 b905000000  mov $0x5,%ecx
10038 f36e  rep outsb %ds:(%rsi),(%dx)
1003a bf00810000  mov $0x8100,%edi
1003f b903000000  mov $0x3,%ecx
10044 66f36d  rep insw (%dx),%es:(%rdi)
10047 be00810000  mov $0x8100,%esi
1004c b902000000  mov $0x2,%ecx
10051 f36f  rep outsl %ds:(%rsi),(%dx)
10053 bae9000000  mov $0xe9,%edx
10058 ee  out %al,(%dx)
10059 ebfe  jmp 0x10059
"""

MEMORY = """
10000 bb000000c0  mov $0xc0000000,%ebx
10005 8a03  mov (%rbx),%al
10007 8803  mov %al,(%rbx)
10009 668b4302  mov 0x2(%rbx),%ax
1000d 66894302  mov %ax,0x2(%rbx)
10011 8b4304  mov 0x4(%rbx),%eax
10014 894304  mov %eax,0x4(%rbx)
10017 488b4308  mov 0x8(%rbx),%rax
1001b 48894308  mov %rax,0x8(%rbx)
1001f e6e9  out %al,$0xe9
10021 ebfe  jmp 0x10021
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

#: An invalid instruction, and no handlers.
FAULT = """
10000 0f0b  ud2
"""

#: Code from a device.
NOWHERE = """
10000 b8000000c0  mov $0xc0000000,%eax
10005 ffe0  jmp *%rax
"""

READ_ONLY = """
10000 c704250000200078563412  movl $0x12345678,0x200000
1000b 8b042500002000  mov 0x200000,%eax
10012 89042500800000  mov %eax,0x8000
10019 e6e9  out %al,$0xe9
1001b ebfe  jmp 0x1001b
"""

REAL = """
7c00 b052  mov $0x52,%al
7c02 e6e0  out %al,$0xe0
7c04 e6e9  out %al,$0xe9
7c06 f4  hlt
7c07 ebfd  jmp 0x7c06
"""

PROTECTED = """
10000 bb000000c0  mov $0xc0000000,%ebx
10005 891b  mov %ebx,(%ebx)
10007 e6e9  out %al,$0xe9
10009 f4  hlt
1000a ebfd  jmp 0x10009
"""

#: INIT and two SIPIs to everybody else, vector 0x11; waits until 0x8000 is 3.
BOOT_OTHERS = """
10000 bb0000e0fe  mov $0xfee00000,%ebx
10005 c783f0000000ff010000  movl $0x1ff,0xf0(%rbx)
1000f c7830003000000450c00  movl $0xc4500,0x300(%rbx)
10019 c7830003000011460c00  movl $0xc4611,0x300(%rbx)
10023 833c250080000003  cmpl $0x3,0x8000
1002b 75f6  jne 0x10023
1002d e6e9  out %al,$0xe9
1002f f4  hlt
10030 ebfd  jmp 0x1002f
"""

OTHERS = """
11000 31c0  xor %ax,%ax
11002 8ed8  mov %ax,%ds
11004 f0ff060080  lock incw 0x8000
11009 f4  hlt
1100a ebfd  jmp 0x11009
"""

OTHERS_KNOCK = """
11000 e6e0  out %al,$0xe0
11002 f4  hlt
11003 ebfd  jmp 0x11002
"""


def test_ports_of_every_size_and_strings(bench: Any) -> None:
    bench.start(PORTS)
    assert bench.done.wait(20)
    assert bench.accesses == [
        ("io", "w", 0, 1, 0x11),
        ("io", "w", 0, 2, 0x2222),
        ("io", "w", 0, 4, 0x33333333),
        ("io", "r", 0, 1, None),
        ("io", "r", 0, 2, None),
        ("io", "r", 0, 4, None),
        *(("io", "w", 0, 1, byte) for byte in (0x11, 0, 0x11, 0x22, 0x11)),
        *(("io", "r", 0, 2, None) for _ in range(3)),
        ("io", "w", 0, 4, 0x22112211),
        ("io", "w", 0, 4, 0x00002211),
    ]
    assert bench.word() == 0x44332211_2211_00_11


def test_memory_accesses_of_every_size(bench: Any) -> None:
    bench.start(MEMORY)
    assert bench.done.wait(20)
    value = 0x8877665544332211
    assert bench.accesses == [
        ("mem", how, offset, size, None if how == "r" else value & (1 << 8 * size) - 1)
        for offset, size in ((0, 1), (2, 2), (4, 4), (8, 8))
        for how in "rw"
    ]


@pytest.mark.parametrize("answer", [-1, 1 << 80 | 0xFFFF])
def test_an_answer_of_too_many_bits_is_cut(make_bench: Any, answer: int) -> None:
    memory, ports = make_bench(), make_bench()
    memory.read = ports.read = lambda _offset, _size: answer
    memory.start(MEMORY)
    ports.start(PORTS)
    assert memory.done.wait(20)
    assert memory.accesses[1] == ("mem", "w", 0, 1, 0xFF)
    assert ports.done.wait(20)
    assert ports.word() & 0xFFFF_00FF == 0xFFFF_00FF
    assert memory.ends == ports.ends == []


def test_stores_to_rom_are_dropped(bench: Any) -> None:
    bench.memory.write(0x200000, b"ROM!")
    bench.start(READ_ONLY)
    assert bench.done.wait(20)
    assert bench.word() == int.from_bytes(b"ROM!", "little")
    assert bench.unsupported == []


def test_real16_starts_at_the_boot_sector(bench: Any) -> None:
    bench.start(REAL, "real16")
    assert bench.done.wait(20)
    assert bench.accesses == [("io", "w", 0, 1, 0x52)]


def test_real16_above_64_kib_starts_in_its_segment(bench: Any) -> None:
    bench.start("\n".join("1" + line for line in REAL.split("\n") if line), "real16")
    assert bench.done.wait(20)
    assert bench.guest.pause(20)
    (registers,) = bench.guest.registers()
    assert (registers["cs"], registers["cs_base"]) == (0x1000, 0x10000)
    assert registers["rip"] in (0x7C06, 0x7C07)


def test_protected32_is_flat(bench: Any) -> None:
    bench.start(PROTECTED, "protected32")
    assert bench.done.wait(20)
    assert bench.accesses == [("mem", "w", 0, 4, 0xC0000000)]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (CpuEntry(0x10000), "starts in real16, protected32, long64, not in ''"),
        (CpuEntry(0x10000, {}, "long64"), "needs the registers gdt and cr3"),
        (CpuEntry(0x10000, {}, "protected32"), "needs the registers gdt$"),
        (CpuEntry(0x10000, {"x0": 1}, "real16"), "no start register 'x0'"),
    ],
)
def test_a_wrong_entry_is_refused(bench: Any, entry: CpuEntry, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        bench.guest.start(entry)


def test_triple_fault_is_the_guests_crash_with_where(bench: Any, caplog: Any) -> None:
    bench.start(FAULT)
    assert bench.ended.wait(20)
    (end,) = bench.ends
    assert end.reason is Reason.GUEST_CRASH
    assert end.code == 7
    assert end.message.startswith("triple fault (vCPU 0, rip ")
    assert "rflags=" in caplog.text


def test_an_internal_error_of_kvm_shows_registers_and_instruction(bench: Any, caplog: Any) -> None:
    bench.start(NOWHERE)
    assert bench.ended.wait(20)
    (end,) = bench.ends
    assert end.reason is Reason.HOST_ERROR
    assert "KVM internal error: instruction emulation failed (vCPU 0, rip 0xc0000000" in end.message
    assert "rax=0xc0000000" in caplog.text
    assert "code: " in caplog.text


def test_a_handler_that_raises_ends_the_guest_once(bench: Any, caplog: Any) -> None:
    def fail(_offset: int, _size: int, _value: int) -> None:
        raise ValueError("a broken vdev")

    bench.write = fail
    bench.start(KNOCKING)
    assert bench.ended.wait(20)
    assert bench.wait(lambda: not bench.guest.status()["running"])
    assert [(end.reason, end.message) for end in bench.ends] == [
        (Reason.HOST_ERROR, "engine failure: ValueError: a broken vdev")
    ]
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)


def test_others_start_by_init_and_sipi(make_bench: Any) -> None:
    bench = make_bench(cpus=4)
    bench.load(OTHERS)
    bench.start(BOOT_OTHERS)
    assert bench.done.wait(20)
    assert bench.word() == 3
    assert bench.guest.pause(20)
    found = bench.guest.registers()
    assert [registers["rip"] for registers in found[1:]] == [0x00A, 0x00A, 0x00A]
    assert [registers["cs"] for registers in found[1:]] == [0x1100] * 3
    names = {thread.name for thread in threading.enumerate()}
    assert {f"qvm-vcpu{index}" for index in range(4)} <= names


def test_faults_of_several_vcpus_at_once_are_one_end(make_bench: Any) -> None:
    together = threading.Barrier(3)

    def fail(_offset: int, _size: int, _value: int) -> None:
        together.wait(20)
        raise ValueError("a broken vdev")

    bench = make_bench(cpus=4)
    bench.write = fail
    bench.load(OTHERS_KNOCK)
    bench.start(BOOT_OTHERS)
    assert bench.ended.wait(20)
    assert bench.wait(lambda: not bench.guest.status()["running"])
    assert len(bench.accesses) == 3
    assert [end.message for end in bench.ends] == ["engine failure: ValueError: a broken vdev"]


def test_one_vcpus_triple_fault_stops_all(make_bench: Any) -> None:
    bench = make_bench(cpus=3)
    bench.start(FAULT)
    assert bench.ended.wait(20)
    assert bench.wait(lambda: not bench.guest.status()["running"])
    assert len(bench.ends) == 1


def test_memory_that_is_no_whole_page_is_refused(make_bench: Any) -> None:
    with pytest.raises(EngineError, match=r"memory at 0x0, 0x1800 bytes: KVM maps pages of 4096"):
        make_bench(specs=(MemorySpec(0, 0x1800),))


def test_a_run_kvm_refuses_ends_the_guest_with_its_error(bench: Any) -> None:
    with open("/dev/null") as nothing:
        os.dup2(nothing.fileno(), bench.guest._vcpus[0].fd)  # no vCPU any more
    bench.guest._backend.enter = lambda _fd, _entry: None
    bench.start(REAL, "real16")
    assert bench.ended.wait(20)
    (end,) = bench.ends
    assert end.reason is Reason.HOST_ERROR
    assert "KVM_RUN of vCPU 0: Inappropriate ioctl for device" in end.message
