"""AddressSpace and GuestMemory."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvmcore.bus import AddressSpace, all_ones
from qvmcore.errors import GuestMemoryError, HostError
from qvmcore.memory import GuestMemory, MemoryRegion
from qvmcore.types import MemorySpec, MmioHandler, Window


class Recorder:
    """A handler that remembers what reached it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.handler = MmioHandler(self.read, lambda *access: self.seen.append(access))

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return 0x42


def test_an_access_reaches_the_handler_with_its_offset() -> None:
    bus, device = AddressSpace(), Recorder()
    bus.insert(0x1000, Window(0x100), device.handler, "dev")
    assert bus.read(0x1010, 4) == 0x42
    bus.write(0x10FC, 4, 7)
    assert device.seen == [(0x10, 4), (0xFC, 4, 7)]


@pytest.mark.parametrize(
    ("address", "size"), [(0xFFF, 1), (0x1100, 1), (0x10FD, 4), (0x1000, 8), (0x10FF, 2), (0, 4)]
)
def test_unsupported_accesses_never_reach_it_and_read_all_ones(address: int, size: int) -> None:
    reports: list[tuple[int, int, int | None]] = []
    bus, device = AddressSpace(lambda *access: reports.append(access)), Recorder()
    bus.insert(0x1000, Window(0x100, access=frozenset({1, 2, 4})), device.handler, "dev")
    assert bus.read(address, size) == all_ones(size)
    bus.write(address, size, 1)
    assert device.seen == []
    assert reports == [(address, size, None), (address, size, 1)]


def test_overlap_is_refused_and_names_both() -> None:
    bus, device = AddressSpace(), Recorder()
    bus.insert(0x1000, Window(0x100), device.handler, "first")
    with pytest.raises(ValueError, match=r"second: \[0x10ff, 0x11ff\) overlaps first at \[0x1000, 0x1100\)"):
        bus.insert(0x10FF, Window(0x100), device.handler, "second")
    bus.freeze()
    with pytest.raises(ValueError, match="frozen"):
        bus.insert(0x9000, Window(0x100), device.handler, "late")


def test_an_observer_hears_of_every_window_once() -> None:
    bus, device, heard = AddressSpace(), Recorder(), list[tuple[str, str]]()
    bus.insert(0x1000, Window(0x100), device.handler, "early")
    bus.observe(lambda each: heard.append(("+", each.owner)), lambda each: heard.append(("-", each.owner)))
    bus.insert(0x2000, Window(0x100), device.handler, "later")
    bus.freeze()
    bar = bus.place(0x3000, Window(0x100), device.handler, "bar")
    bus.remove(bar)
    bus.remove(bar)
    assert heard == [("+", "early"), ("+", "later"), ("+", "bar"), ("-", "bar")]
    with pytest.raises(ValueError, match="observer already"):
        bus.observe(lambda each: None, lambda each: None)


def test_a_refused_window_is_not_heard_of() -> None:
    bus, device, heard = AddressSpace(), Recorder(), list[str]()
    bus.observe(lambda each: heard.append(each.owner), lambda each: None)
    bus.insert(0x1000, Window(0x100), device.handler, "first")
    with pytest.raises(ValueError, match="overlaps"):
        bus.place(0x1080, Window(0x100), device.handler, "second")
    assert heard == ["first"]


def test_windows_may_come_and_go_after_the_freeze() -> None:
    bus, fixed, device = AddressSpace(), Recorder(), Recorder()
    bus.insert(0x1000, Window(0x100), fixed.handler, "fixed")
    bus.freeze()
    placed = bus.place(0x1100, Window(0x100), device.handler, "bar")
    bus.write(0x1100, 4, 1)
    with pytest.raises(ValueError, match=r"bar2: \[0x11ff, 0x12ff\) overlaps bar at"):
        bus.place(0x11FF, Window(0x100), device.handler, "bar2")
    bus.remove(placed)
    bus.remove(placed)
    bus.write(0x1100, 4, 2)
    again = bus.place(0x2000, Window(0x100), device.handler, "bar")
    bus.write(0x2004, 4, 3)
    bus.write(0x1000, 4, 4)
    assert (device.seen, fixed.seen) == ([(0, 4, 1), (4, 4, 3)], [(0, 4, 4)])
    assert [mapped.owner for mapped in bus] == ["fixed", "bar"]
    assert again.end == 0x2100


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 4096)), max_size=30), st.integers(0, 1 << 20)
)
def test_lookup_equals_a_linear_search(places: list[tuple[int, int]], address: int) -> None:
    bus, placed = AddressSpace(), []
    for number, (base, size) in enumerate(places):
        if bus.overlap(base, size) is None:
            bus.insert(
                base, Window(size), MmioHandler(lambda o, s, n=number: n, lambda o, s, v: None), str(number)
            )
            placed.append((base, size, number))
    wanted = [number & 0xFF for base, size, number in placed if base <= address < base + size]
    assert bus.read(address, 1) & 0xFF == (wanted[0] if wanted else 0xFF)


def test_memory_views_are_the_memory_and_are_bounded() -> None:
    memory = GuestMemory.allocate([MemorySpec(0x1000, 0x1000), MemorySpec(0x8000, 0x1000)])
    memory.write(0x8FFC, b"abcd")
    assert memory.read(0x8FFC, 4) == b"abcd"
    memory.view(0x8FFC, 4)[:] = b"wxyz"
    assert memory.read(0x8FFE, 2) == b"yz"
    for address, size in [
        (0x1FFF, 2),
        (0x7FFF, 1),
        (0, 1),
        (0x9000, 1),
        (0x8000, -1),
        (1 << 64, 1),
        (0x1000, 1 << 63),
    ]:
        with pytest.raises(GuestMemoryError):
            memory.view(address, size)
        assert not memory.contains(address, size)
    assert memory.contains(0x1000, 0x1000)
    memory.close()
    memory.close()


def test_memory_the_host_does_not_have_is_a_host_error() -> None:
    with pytest.raises(HostError, match="cannot map"):
        GuestMemory.allocate([MemorySpec(0, 1 << 62)])


def test_memory_stays_usable_for_a_view_that_outlives_close() -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 0x1000)])
    view = memory.view(0, 4)
    memory.close()
    view[:] = b"late"  # a worker that could not be stopped; must not crash the process


def test_nobody_who_shares_the_memory_can_make_it_shorter() -> None:
    region = MemoryRegion(MemorySpec(0, 0x2000))
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 0x1000)
    region.close()
