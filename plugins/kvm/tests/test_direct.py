"""Parts of windows that are memory of this process: the guest reaches them without an exit."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
from qvm_kvm.direct import DirectWindows

from qvmcore.api import DirectPart, MmioHandler, Window

WINDOW = 0xD000_0000
#: Waits for a word at 0x8000; reads 0xd0001000, writes it plus 1 behind it, and then to 0xd0000000.
PROGRAM = """
10000 8b042500800000  mov 0x8000,%eax
10007 85c0  test %eax,%eax
10009 74f5  je 0x10000
1000b c704250080000000000000  movl $0x0,0x8000
10016 bb001000d0  mov $0xd0001000,%ebx
1001b 8b0b  mov (%rbx),%ecx
1001d ffc1  inc %ecx
1001f 894b04  mov %ecx,0x4(%rbx)
10022 bb000000d0  mov $0xd0000000,%ebx
10027 890b  mov %ecx,(%rbx)
10029 e6e9  out %al,$0xe9
1002b ebd3  jmp 0x10000
"""


def go(bench: Any) -> list[tuple[int, int | None]]:
    """Once through the program; the accesses that came to us."""
    seen.clear()
    bench.done.clear()
    bench.memory.write(0x8000, b"\1")
    assert bench.done.wait(20)
    return list(seen)


seen: list[tuple[int, int | None]] = []


def _read(offset: int, _size: int) -> int:
    seen.append((offset, None))
    return 7


HANDLER = MmioHandler(_read, lambda offset, _size, value: seen.append((offset, value)))


def test_a_part_is_the_guest_s_memory_while_its_window_is_there(make_bench: Any) -> None:
    bench = make_bench()
    memory = mmap.mmap(-1, 0x1000)
    memory[:4] = (41).to_bytes(4, "little")
    part = DirectPart(0x1000, 0x1000, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    window = Window(0x2000)
    placed = bench.bus.place(WINDOW, window, HANDLER._replace(direct=(part,)), "device")
    bench.start(PROGRAM)
    assert go(bench) == [(0, 42)]
    assert memory[4:8] == (42).to_bytes(4, "little")
    assert bench.guest.status()["direct"] == 1
    bench.bus.remove(placed)
    assert bench.guest.status()["direct"] == 0
    bench.bus.place(WINDOW, window, HANDLER, "device")
    assert go(bench) == [(0x1000, None), (0x1004, 8), (0, 8)]
    bench.bus.remove(next(each for each in bench.bus if each.base == WINDOW))
    bench.bus.place(WINDOW, window, HANDLER._replace(direct=(part,)), "device")
    assert go(bench) == [(0, 42)]


def test_what_kvm_refuses_takes_the_slow_way(make_bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Here half a page."""
    bench = make_bench()
    bench.bus.place(
        WINDOW, Window(0x2000), HANDLER._replace(direct=(DirectPart(0x1000, 0x800, 0x1000),)), "odd"
    )
    bench.start(PROGRAM)
    assert go(bench) == [(0x1000, None), (0x1004, 8), (0, 8)]
    assert bench.guest.status()["direct_refused"] == 1
    assert "odd: KVM does not map 0xd0001000" in caplog.text


def test_nothing_is_mapped_after_the_end() -> None:
    direct = DirectWindows(None)  # type: ignore[arg-type]
    direct.close()

    class Placed:
        base, owner = WINDOW, "late"
        handler = HANDLER._replace(direct=(DirectPart(0, 0x1000, 0x1000),))

    direct.add(Placed())
    direct.remove(Placed())
    assert direct.count == 0
