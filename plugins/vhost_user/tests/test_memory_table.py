"""SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG: what a client may say about its memory, and what not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from qvm_vhost_user.memory import MemoryTable, Place, parse_single, parse_table
from qvm_vhost_user.protocol import MEM_SLOTS, REGION, SINGLE, TABLE, Request
from qvm_vhost_user.wire import Fd, Message
from session_kit import descriptors

from qvmcore.api import ClientError, GuestError, GuestMemory, HostError

PAGE = 4096
USER = 0x7F00_0000_0000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    before = descriptors()
    memory = GuestMemory()
    yield memory
    memory.close()
    memory.replace(())
    assert not descriptors() - before


@pytest.fixture
def table(memory: GuestMemory) -> MemoryTable:
    return MemoryTable(memory, lambda change, *, in_parts=False: change())


def file(size: int = PAGE, fill: bytes = b"") -> Fd:
    fd = os.memfd_create("client")
    os.ftruncate(fd, size)
    os.pwrite(fd, fill, 0)
    return Fd(fd)


def place(guest: int, size: int = PAGE, user: int | None = None, offset: int = 0) -> Place:
    return Place(guest, size, USER + guest if user is None else user, offset)


def test_SET_MEM_TABLE_maps_each_region_from_its_file_and_offset(
    memory: GuestMemory, table: MemoryTable
) -> None:
    table.replace(
        [place(0, offset=100), place(0x10000, 2 * PAGE)],
        [file(8192, b"." * 100 + b"low"), file(8192, b"high")],
    )
    assert memory.read(0, 3) == b"low"
    assert memory.read(0x10000, 4) == b"high"
    assert table.guest_address(USER + 0x10004) == 0x10004
    with pytest.raises(GuestError, match="in no region of the memory table"):
        table.guest_address(USER + PAGE)


def test_SET_MEM_TABLE_replaces_what_was_there_and_unmaps_it(memory: GuestMemory, table: MemoryTable) -> None:
    table.replace([place(0)], [file(fill=b"old")])
    old = memory.regions[0]
    table.replace([place(0)], [file(fill=b"new")])
    assert memory.read(0, 3) == b"new"
    assert old.fd == -1
    table.replace([], [])
    assert memory.regions == ()


def test_SET_MEM_TABLE_may_have_more_room_than_regions() -> None:
    whole = TABLE.pack(1, 0) + REGION.pack(1, 2, 3, 4) + REGION.pack(0, 0, 0, 0)
    assert parse_table(whole) == [Place(1, 2, 3, 4)]
    with pytest.raises(ClientError, match="announces 3 regions, its length is that of 2"):
        parse_table(TABLE.pack(3, 0) + bytes(2 * REGION.size))


def test_ADD_MEM_REG_and_REM_MEM_REG_have_padding_first() -> None:
    assert parse_single(SINGLE.pack(9, 1, 2, 3, 4)) == Place(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (place(PAGE, 0), "is empty"),
        (place(2**64 - PAGE, PAGE + 1, 0), "goes beyond the end of the guest addresses"),
        (place(PAGE, PAGE, 2**64 - 1), "goes beyond the end of the client addresses"),
        (place(PAGE, PAGE, offset=2**64 - 1), "goes beyond the end of the file addresses"),
        (place(PAGE - 1), "overlaps memory"),
        (place(1, 1), "overlaps memory"),
        (place(PAGE, user=USER + PAGE - 1), "overlaps memory"),
        (place(PAGE, PAGE + 1), "not inside a file of 0x1000 bytes"),
        (place(PAGE, offset=1), "not inside a file of 0x1000 bytes"),
        (place(PAGE, 2**62), "not inside a file of 0x1000 bytes"),
    ],
)
@pytest.mark.parametrize("alone", [True, False], ids=["ADD_MEM_REG", "SET_MEM_TABLE"])
def test_lies_about_a_region_leave_everything_as_it_was(
    memory: GuestMemory, table: MemoryTable, bad: Place, message: str, alone: bool
) -> None:
    table.replace([place(0)], [file(fill=b"mine")])
    fds = [file()] if alone else [file(), file()]
    with pytest.raises(ClientError, match=message), Message(Request.SET_MEM_TABLE, False, b"", fds):
        if alone:
            table.add(bad, *fds)
        else:
            table.replace([place(0), bad], fds)
    assert memory.read(0, 4) == b"mine"
    assert table.guest_address(USER) == 0


def test_SET_MEM_TABLE_needs_a_descriptor_for_each_region(table: MemoryTable) -> None:
    fds = [file(), file()]
    with pytest.raises(ClientError, match="has 1 regions and came with 2 descriptors"):
        table.replace([place(0)], fds)
    for fd in fds:
        fd.close()


@pytest.mark.parametrize(
    "make", [lambda: os.open(os.devnull, os.O_RDWR), lambda: os.eventfd(0), lambda: os.open("/", os.O_RDONLY)]
)
def test_what_cannot_be_mapped_is_refused(table: MemoryTable, make: Callable[[], int]) -> None:
    fd = Fd(make())
    with pytest.raises(ClientError, match=r"memory \[0x0, \+0x1000\): "):
        table.add(place(0), fd)
    assert fd.number == -1


def test_ADD_MEM_REG_and_REM_MEM_REG_change_one_region(memory: GuestMemory, table: MemoryTable) -> None:
    table.add(place(0), file(fill=b"one"))
    table.add(place(PAGE), file(fill=b"two"))
    assert memory.read(PAGE, 3) == b"two"
    first = memory.regions[0]
    # The offset is not looked at.
    table.remove(place(0, offset=77))
    assert [region.start for region in memory.regions] == [PAGE]
    assert first.fd == -1
    for other in (place(0), place(PAGE, 2 * PAGE), place(PAGE, user=1)):
        with pytest.raises(ClientError, match="cannot leave"):
            table.remove(other)
    assert len(memory.regions) == 1


def test_ADD_MEM_REG_beyond_the_slots_is_refused(table: MemoryTable) -> None:
    for index in range(MEM_SLOTS):
        table.add(place(index * PAGE), file())
    with pytest.raises(ClientError, match=f"one more than the {MEM_SLOTS} slots"):
        table.add(place(MEM_SLOTS * PAGE), extra := file())
    extra.close()


def test_memory_that_the_device_does_not_leave_stays_mapped(memory: GuestMemory) -> None:
    hangs = False

    def apply(change: Callable[[], None], *, in_parts: bool = False) -> None:
        if hangs:
            raise HostError("the worker still runs")
        change()

    table = MemoryTable(memory, apply)
    table.replace([place(0)], [file(fill=b"busy")])
    hangs = True
    for attempt in (
        lambda: table.replace([], []),
        lambda: table.add(place(PAGE), file()),
        lambda: table.remove(place(0)),
    ):
        with pytest.raises(ClientError, match="memory cannot change: the worker still runs"):
            attempt()
        assert memory.read(0, 4) == b"busy"
