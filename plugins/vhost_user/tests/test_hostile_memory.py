"""Memory tables that lie, and files that are no memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence

import pytest
from hostile_kit import Target, rejected, verdict
from odd_files import event, folder, null, opath, pipe, unix
from qvm_vhost_user.protocol import NEED_REPLY, TABLE, U64, VERSION, Request
from qvm_vhost_user.testing import Client, Closed, Region
from qvm_vhost_user.testing_driver import USER

MIB = 1 << 20
TOP = 1 << 64


def memfd(size: int, fds: list[int]) -> int:
    """Memory of this size."""
    fd = os.memfd_create("attack")
    fds.append(fd)
    os.ftruncate(fd, size)
    return fd


def table(regions: Sequence[Region], count: int | None = None) -> bytes:
    """SET_MEM_TABLE's payload; ``count`` is what it says of their number."""
    announced = len(regions) if count is None else count
    return TABLE.pack(announced, 0) + b"".join(region.pack() for region in regions)


def greeted(target: Target) -> Client:
    """A client that has negotiated everything."""
    client = target.client()
    client.negotiate()
    client.tell(Request.SET_FEATURES, U64.pack(1 << 32 | 1 << 30))
    return client


LIES = {
    "beyond the file": Region(0, 2 * MIB, USER, -1),
    "just beyond the file": Region(0, MIB + 1, USER, -1),
    "offset beyond the file": Region(0, MIB, USER, -1, 0x1000),
    "offset at the top": Region(0, MIB, USER, -1, TOP - 0x1000),
    "offset wraps": Region(0, MIB, USER, -1, TOP - MIB),
    "guest wraps": Region(TOP - 0x1000, MIB, USER, -1),
    "user wraps": Region(0, MIB, TOP - 0x1000, -1),
    "no size": Region(0, 0, USER, -1),
    "size of all": Region(0, TOP - 1, USER, -1),
    "size of half": Region(0, 1 << 63, USER, -1),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("slot", [False, True], ids=["table", "slot"])
def test_a_region_that_cannot_be(target: Target, lie: Region, slot: bool, fds: list[int]) -> None:
    region = lie._replace(fd=memfd(MIB, fds))
    with greeted(target) as client:
        if slot:
            rejected(target, client, Request.ADD_MEM_REG, U64.pack(0) + region.pack(), (region.fd,))
        else:
            rejected(target, client, Request.SET_MEM_TABLE, table([region]), (region.fd,))


OVERLAPS = {
    "the same twice": (Region(0, MIB, USER, -1), Region(0, MIB, USER, -1)),
    "guest ranges": (Region(0, MIB, USER, -1), Region(MIB - 1, MIB, USER + 4 * MIB, -1)),
    "client ranges": (Region(0, MIB, USER, -1), Region(4 * MIB, MIB, USER + MIB - 1, -1)),
    "inside": (Region(0, MIB, USER, -1), Region(0x1000, 0x1000, USER + 8 * MIB, -1)),
}


@pytest.mark.parametrize("regions", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("slot", [False, True], ids=["table", "slot"])
def test_regions_that_overlap(
    target: Target, regions: tuple[Region, Region], slot: bool, fds: list[int]
) -> None:
    first, second = (region._replace(fd=memfd(MIB, fds)) for region in regions)
    with greeted(target) as client:
        if slot:
            client.add_mem_reg(first)
            rejected(target, client, Request.ADD_MEM_REG, U64.pack(0) + second.pack(), (second.fd,))
        else:
            rejected(target, client, Request.SET_MEM_TABLE, table([first, second]), (first.fd, second.fd))


@pytest.mark.parametrize(
    ("count", "regions", "sent"),
    [
        (2, 1, 1),
        (1, 2, 2),
        (1, 1, 0),
        (1, 1, 2),
        (2, 2, 1),
        (0xFFFF_FFFF, 1, 1),
        (0, 1, 1),
        (9, 8, 8),
        (8, 8, 7),
    ],
)
def test_a_table_whose_numbers_disagree(
    target: Target, count: int, regions: int, sent: int, fds: list[int]
) -> None:
    rows = [Region(n * MIB, MIB, USER + n * MIB, memfd(MIB, fds)) for n in range(regions)]
    passed = tuple(memfd(MIB, fds) for _ in range(sent))
    with greeted(target) as client:
        rejected(target, client, Request.SET_MEM_TABLE, table(rows, count), passed)


@pytest.mark.parametrize(("guest", "offset", "size"), [(1, 0, 0x1000), (0, 1, 0x1000), (0x800, 0x123, 0x777)])
def test_unaligned_regions_are_harmless(
    target: Target, guest: int, offset: int, size: int, fds: list[int]
) -> None:
    """They may be taken: the protocol asks for no alignment."""
    region = Region(guest, size, USER + guest, memfd(MIB, fds), offset)
    with greeted(target) as client:
        client.send(Request.SET_MEM_TABLE, table([region]), [region.fd], flags=VERSION | NEED_REPLY)
        assert verdict(client) in ("accepted", "refused", "closed")


def read_only(fds: list[int]) -> int:
    """Memory that may not be written."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(MIB))
        file.flush()
        return os.open(file.name, os.O_RDONLY)


@pytest.mark.parametrize("make", [folder, null, pipe, unix, event, opath])
@pytest.mark.parametrize("slot", [False, True], ids=["table", "slot"])
def test_a_descriptor_that_is_no_memory(
    target: Target, make: Callable[[list[int]], int], slot: bool, fds: list[int]
) -> None:
    fd = make(fds)
    fds.append(fd)
    region = Region(0, 0x1000, USER, fd)
    with greeted(target) as client:
        if slot:
            rejected(target, client, Request.ADD_MEM_REG, U64.pack(0) + region.pack(), (fd,))
        else:
            rejected(target, client, Request.SET_MEM_TABLE, table([region]), (fd,))


def test_memory_that_may_not_be_written_is_refused(target: Target, fds: list[int]) -> None:
    fds.append(read_only(fds))
    region = Region(0, MIB, USER, fds[-1])
    with greeted(target) as client:
        rejected(target, client, Request.SET_MEM_TABLE, table([region]), (region.fd,))


def test_a_region_that_is_not_there_is_not_removed(target: Target, fds: list[int]) -> None:
    region = Region(0, MIB, USER, memfd(MIB, fds))
    with greeted(target) as client:
        client.add_mem_reg(region)
        other = region._replace(size=MIB // 2)
        rejected(target, client, Request.REM_MEM_REG, U64.pack(0) + other.pack())


def test_more_slots_than_were_promised(target: Target, fds: list[int]) -> None:
    fd = memfd(0x1000, fds)
    with greeted(target) as client:
        slots = client.ask_u64(Request.GET_MAX_MEM_SLOTS)
        assert 1 <= slots <= 1024
        regions = [Region(n * 0x1000, 0x1000, USER + n * 0x1000, fd) for n in range(slots + 1)]
        for region in regions[:-1]:
            client.add_mem_reg(region)
        last = regions[-1]
        rejected(target, client, Request.ADD_MEM_REG, U64.pack(0) + last.pack(), (fd,))


def test_memory_exchanged_a_thousand_times_leaves_nothing(target: Target, fds: list[int]) -> None:
    with greeted(target) as client:
        for _ in range(1000):
            client.set_mem_table([target.region()])
        more = target.resources()[0].total() - target.baseline[0].total()
        assert more < 16, f"the server holds {more} descriptors more than before"


def test_memory_taken_away_under_running_rings(target: Target) -> None:
    """The rings are dead, the device lives on: a reset helps."""
    driver = target.driver()
    with driver:
        driver.start()
        other = Region(0, MIB, USER, os.memfd_create("other"))
        os.ftruncate(other.fd, MIB)
        try:
            driver.client.set_mem_table([other])
            driver.notify(0)
        except Exception as error:
            assert isinstance(error, Closed) or "SET_MEM_TABLE" in str(error), error
        finally:
            os.close(other.fd)
