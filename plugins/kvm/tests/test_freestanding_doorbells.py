"""Doorbells: N stores are N in the eventfd and no exit to Python; shown by the engine's own counters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from plugins.kvm.tests.conftest import Pc
from qvmcore.api import Doorbell, Window

COUNT = 500
BASE, PORT_BASE = 0xC100_0000, 0x500


@pytest.fixture
def fd() -> Iterator[int]:
    """An eventfd."""
    made = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield made
    os.close(made)


def taken(fd: int) -> int:
    """What is in it."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def status(pc: Pc) -> Any:
    """What the engine counts."""
    return pc.guest.status()


def stores(offset: int, instruction: str = "movl %ecx, (%rbx)", count: int = COUNT) -> str:
    """That many stores to the window, with the values ``count`` down to 1."""
    return f"movl ${BASE + offset:#x}, %ebx; movl ${count}, %ecx; 1: {instruction}; loop 1b; through"


def test_a_memory_doorbell_costs_no_exit(pc: Pc, fd: int) -> None:
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(0x50, 4), fd),))
    pc.bus.insert(BASE, Window(0x1000), bell, "bell")
    pc.run(stores(0x50))
    assert taken(fd) == COUNT
    assert pc.log == []
    assert pc.exits == {"io": 1, "mmio": 0}
    assert status(pc)["doorbells"] == 1


def test_a_register_that_is_no_doorbell_costs_one_exit_each(pc: Pc, fd: int) -> None:
    """The comparison that shows the counter counts."""
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(0x50, 4), fd),))
    pc.bus.insert(BASE, Window(0x1000), bell, "bell")
    pc.run(stores(0x54))
    assert taken(fd) == 0
    assert pc.exits["mmio"] == COUNT == len(pc.log)


@pytest.mark.parametrize("instruction", ["outw %ax, %dx", "outl %eax, %dx"])
def test_a_port_doorbell_costs_no_exit(pc: Pc, fd: int, instruction: str) -> None:
    size = 2 if instruction.startswith("outw") else 4
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(2, size), fd),))
    pc.ports.insert(PORT_BASE, Window(8), bell, "bell")
    pc.run(f"movw ${PORT_BASE + 2:#x}, %dx; movl ${COUNT}, %ecx; 1: {instruction}; loop 1b; through")
    assert taken(fd) == COUNT
    assert pc.log == []
    assert pc.exits == {"io": 1, "mmio": 0}


def test_only_the_value_that_matches_rings(pc: Pc, fd: int) -> None:
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(0x50, 4, datamatch=3), fd),))
    pc.bus.insert(BASE, Window(0x1000), bell, "bell")
    pc.run(stores(0x50, count=10))
    assert taken(fd) == 1
    assert pc.log == [("bell", 0x50, 4, value) for value in range(10, 0, -1) if value != 3]


def test_two_values_of_one_register_ring_two_bells(pc: Pc, fd: int) -> None:
    """As the queues of a device that share a notify register."""
    other = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    bells = ((Doorbell(0x50, 4, datamatch=1), fd), (Doorbell(0x50, 4, datamatch=2), other))
    pc.bus.insert(BASE, Window(0x1000), pc.handler("bell")._replace(doorbells=bells), "bell")
    pc.run(stores(0x50, count=2))
    assert (taken(fd), taken(other), pc.log) == (1, 1, [])
    assert status(pc)["doorbells"] == 2
    os.close(other)


@pytest.mark.parametrize("instruction", ["movw %cx, (%rbx)", "movb %cl, (%rbx)", "mov %rcx, (%rbx)"])
def test_a_store_of_another_size_takes_the_slow_way(pc: Pc, fd: int, instruction: str) -> None:
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(0x50, 4), fd),))
    pc.bus.insert(BASE, Window(0x1000), bell, "bell")
    pc.run(stores(0x50, instruction, count=5))
    assert taken(fd) == 0
    assert len(pc.log) == 5


def test_a_load_of_a_doorbell_is_a_load(pc: Pc, fd: int) -> None:
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(0x50, 4), fd),))
    pc.bus.insert(BASE, Window(0x1000), bell, "bell")
    pc.run(stores(0x50, "movl (%rbx), %eax", count=5))
    assert taken(fd) == 0
    assert pc.log == [("bell", 0x50, 4, None)] * 5


def test_doorbells_follow_their_window_while_the_guest_rings(pc: Pc, fd: int) -> None:
    """A BAR is moved while another CPU, or this one, still writes to where it was."""
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(0x50, 4), fd),))
    ringing = "2: movl %ecx, (%rbx); movl %ecx, 0x1000(%rbx); jmp 2b"
    pc.start(f"movl ${BASE + 0x50:#x}, %ebx; say $1; {ringing}")
    assert pc.wait_said(1)
    for turn in range(20):
        mapped = pc.bus.place(BASE + turn % 2 * 0x1000, Window(0x1000), bell, "bell")
        assert pc.wait(lambda: taken(fd) > 0)
        assert status(pc)["doorbells"] == 1
        pc.bus.remove(mapped)
        assert status(pc)["doorbells"] == 0
    assert pc.guest.stop(10)
    assert {access[1] for access in pc.log} <= {0x50}


def test_an_eventfd_of_the_device_closed_early_hurts_nobody(pc: Pc) -> None:
    """KVM holds its own reference."""
    early = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    bell = pc.handler("bell")._replace(doorbells=((Doorbell(0x50, 4), early),))
    pc.bus.insert(BASE, Window(0x1000), bell, "bell")
    pc.start(f"say $1; 9: inb $0xe8, %al; cmpb $0, %al; jne 9b; {stores(0x50)}")
    assert pc.wait_said(1)
    os.close(early)
    pc.ports.place(0xE8, Window(1), pc.handler("go")._replace(read=lambda _o, _s: 0), "go")
    assert pc.through.wait(20)
    assert pc.exits["mmio"] == 0
