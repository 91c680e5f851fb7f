"""DEVICE_GET_REGION_INFO, REGION_READ, REGION_WRITE, REGION_WRITE_MULTI."""

from __future__ import annotations

import errno
import struct

import pytest
from qvm_vfio_user.testing import ACCESS, CONFIG_REGION, MULTI, REGION_INFO, Command, Refused, Region
from qvm_vfio_user.wire import TRANSFER_MAX

from plugins.vfio_user.tests.vfio_bench import serving


def test_DEVICE_GET_REGION_INFO_says_the_bars_and_configuration_space() -> None:
    with serving() as bench:
        bench.client.version()
        found = [bench.client.region(index) for index in range(9)]
        bar, none = Region(3, 0x1000), Region(0, 0)
        # BAR 1 is wide, and takes 2 as well; the MSI-X table is BAR 3.
        assert found == [bar, bar, none, bar, none, none, none, Region(3, 256), none]


@pytest.mark.parametrize("argsz, index", [(31, 0), (0, 7), (32, 9), (32, 0xFFFFFFFF)])
def test_DEVICE_GET_REGION_INFO_of_what_is_not_there_is_refused(argsz: int, index: int) -> None:
    with serving() as bench:
        bench.client.version()
        asked = REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
        assert bench.client.ask(Command.GET_REGION_INFO, asked).errno == errno.EINVAL


@pytest.mark.parametrize("argsz, errno_", [(15, errno.EINVAL), (16, 0), (4096, 0)])
def test_DEVICE_GET_INFO_says_a_pci_device_that_can_be_reset(argsz: int, errno_: int) -> None:
    with serving() as bench:
        bench.client.version()
        reply = bench.client.ask(Command.GET_INFO, struct.pack("<IIII", argsz, 0, 0, 0))
        assert reply.errno == errno_
        assert reply.payload == (b"" if errno_ else struct.pack("<IIII", 16, 3, 9, 3))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1, 5, 0xFF8])
def test_REGION_accesses_the_window_takes_go_through_as_they_come(size: int, offset: int) -> None:
    value = int.from_bytes(b"\x11\x22\x33\x44\x55\x66\x77\x88"[:size], "little")
    with serving() as bench:
        client = bench.ready()
        bench.vdev.seen.clear()
        client.write(1, offset, size, value)
        assert client.read(1, offset, size) == value
        assert bench.vdev.seen == [("write", 1, offset, size, value), ("read", 1, offset, size, value)]


@pytest.mark.parametrize(
    "window, offset, count, sizes",
    [
        (1, 1, 7, [1, 2, 4]),
        (1, 0, 3, [2, 1]),
        (1, 8, 24, [8, 8, 8]),
        (1, 3, 12, [1, 4, 4, 2, 1]),
        (0, 0, 8, [4, 4]),
        (0, 4, 16, [4] * 4),
    ],
)
def test_REGION_accesses_of_other_sizes_are_split_into_aligned_ones(
    window: int, offset: int, count: int, sizes: list[int]
) -> None:
    data = bytes(range(1, count + 1))
    with serving() as bench:
        client = bench.ready()
        bench.vdev.seen.clear()
        client.write(window, offset, count, int.from_bytes(data, "little"))
        assert client.read_bytes(window, offset, count) == data
        assert [each[3] for each in bench.vdev.seen] == sizes * 2
        assert bench.vdev.bytes[offset : offset + count] == data


def test_REGION_pieces_the_window_does_not_take_read_ones_and_are_dropped() -> None:
    with serving() as bench:
        client = bench.ready()
        bench.vdev.bytes[:8] = bytes(range(8))
        bench.vdev.seen.clear()
        assert client.read_bytes(0, 0, 6) == bytes([0, 1, 2, 3, 0xFF, 0xFF])
        assert client.read_bytes(0, 2, 2) == b"\xff\xff"
        client.write(0, 0, 1, 0x55)
        assert bench.vdev.seen == [("read", 0, 0, 4, 0x03020100)]
        assert client.read_bytes(0, 0, 0) == b""


def test_REGION_READ_of_all_configuration_space_at_once() -> None:
    with serving() as bench:
        client = bench.ready()
        space = client.read_bytes(CONFIG_REGION, 0, 256)
        assert space[:4] == struct.pack("<HH", 0x1C05, 0x43) and space[4:6] == b"\x06\0"
        assert space == bytes(client.read(CONFIG_REGION, at, 1) for at in range(256))


def test_a_client_sizes_bars_through_configuration_space() -> None:
    """PCI 3.0, 6.2.5.1, as Cloud Hypervisor does it; QEMU does without."""
    with serving() as bench:
        client = bench.ready()
        for at in range(0x10, 0x28, 4):
            client.write(CONFIG_REGION, at, 4, 0xFFFFFFFF)
        masks = [client.read(CONFIG_REGION, at, 4) for at in range(0x10, 0x28, 4)]
        assert masks == [0xFFFFF000, 0xFFFFF004, 0xFFFFFFFF, 0xFFFFF000, 0, 0]


@pytest.mark.parametrize(
    "region, offset, count",
    [
        (0, 0x1000, 4),
        (0, 0xFFD, 4),
        (0, (1 << 64) - 4, 4),
        (2, 0, 4),
        (6, 0, 0),
        (7, 0x100, 1),
        (8, 0, 1),
        (9, 0, 4),
        (0xFFFFFFFF, 0, 4),
        (1, 0, 0xFFFFFFFF),
    ],
)
def test_REGION_accesses_outside_are_refused(region: int, offset: int, count: int) -> None:
    with serving() as bench:
        client = bench.ready()
        assert client.ask(Command.REGION_READ, ACCESS.pack(offset, region, count)).errno == errno.EINVAL
        if count < 100:
            data = ACCESS.pack(offset, region, count) + bytes(count)
            assert client.ask(Command.REGION_WRITE, data).errno == errno.EINVAL
        assert bench.vdev.seen == []


@pytest.mark.parametrize("came", [0, 3, 5, TRANSFER_MAX])
def test_REGION_WRITE_whose_count_is_not_its_data_is_refused(came: int) -> None:
    with serving() as bench:
        client = bench.ready()
        assert client.ask(Command.REGION_WRITE, ACCESS.pack(0, 1, 4) + bytes(came)).errno == errno.EINVAL
        assert bench.vdev.seen == []


def test_reply_sizes_of_REGION_messages_are_those_strict_clients_read() -> None:
    with serving() as bench:
        client = bench.ready()
        head = ACCESS.pack(4, 1, 4)
        assert client.request(Command.REGION_WRITE, head + b"abcd") == head
        assert client.request(Command.REGION_READ, head) == head + b"abcd"


def test_posted_REGION_WRITEs_are_done_in_order_and_not_answered() -> None:
    with serving() as bench:
        client = bench.ready()
        bench.vdev.seen.clear()
        for value in range(300):
            client.write(1, 4 * value, 4, value, posted=True)
        assert client.read(1, 4, 4) == 1
        assert [each[4] for each in bench.vdev.seen[:-1]] == list(range(300))


def test_REGION_WRITE_MULTI_does_all_its_writes() -> None:
    with serving() as bench:
        client = bench.ready()
        bench.vdev.seen.clear()
        writes = [(1, 0, 1, 0x11), (1, 8, 8, 0x2233445566778899), (0, 4, 4, 0xCAFE), (1, 5, 3, 0x665544)]
        client.write_multi(writes, posted=True)
        client.write_multi(writes[:1], posted=False)
        assert [each[1:] for each in bench.vdev.seen] == [
            (1, 0, 1, 0x11),
            (1, 8, 8, 0x2233445566778899),
            (0, 4, 4, 0xCAFE),
            (1, 5, 1, 0x44),
            (1, 6, 2, 0x6655),
            (1, 0, 1, 0x11),
        ]


@pytest.mark.parametrize(
    "count, writes",
    [
        (2, MULTI.pack(0, 1, 4, bytes(8))),
        (0, MULTI.pack(0, 1, 4, bytes(8))),
        ((1 << 64) - 1, b""),
        (1, MULTI.pack(0, 1, 9, bytes(8))),
        (2, MULTI.pack(0, 1, 4, bytes(8)) + MULTI.pack(0x1000, 1, 4, bytes(8))),
        (2, MULTI.pack(0, 1, 4, bytes(8)) + MULTI.pack(0, 8, 4, bytes(8))),
    ],
)
def test_REGION_WRITE_MULTI_with_an_impossible_write_does_none(count: int, writes: bytes) -> None:
    with serving() as bench:
        client = bench.ready()
        assert client.ask(Command.WRITE_MULTI, struct.pack("<Q", count) + writes).errno == errno.EINVAL
        assert bench.vdev.seen == []


def test_REGION_WRITE_MULTI_is_refused_when_it_was_not_negotiated() -> None:
    with serving() as bench:
        bench.client.version({})
        with pytest.raises(Refused) as error:
            bench.client.write_multi([(1, 0, 4, 1)], posted=False)
        assert error.value.errno == errno.ENOTSUP and bench.vdev.seen == []


def test_any_REGION_access_makes_the_life_used() -> None:
    for ask in ("read", "write", "write_multi", "reset"):
        with serving() as bench:
            bench.client.version()
            bench.client.region(0)
            assert not bench.served.used
            if ask == "read":
                bench.client.read(7, 0, 4)
            elif ask == "write":
                bench.client.write(7, 0, 4, 0)
            elif ask == "write_multi":
                bench.client.write_multi([(1, 0, 4, 1)], posted=False)
            else:
                bench.client.reset()
            assert bench.served.used
