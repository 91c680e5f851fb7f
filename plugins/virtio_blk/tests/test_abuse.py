"""What a hostile guest may do to a disk: it gets an error, and the disk works on (5.2, 2.7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    Guest,
    Start,
    header,
    segment,
)

from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.driver import MmioDriver, Piece, VirtioDriver
from qvmcore.testing.fakes import Plugged, plug

Disk = Callable[..., Plugged[VirtioBlk]]
NEXT, WRITE = 1, 2
SEGMENTS = st.builds(
    segment,
    st.sampled_from([0, 1, 127, 128, (1 << 64) - 1]),
    st.sampled_from([0, 1, 8, 1 << 31]),
    st.integers(0, 2),
)


@pytest.mark.parametrize("sector", [128, 129, 1 << 32, 1 << 54, 1 << 55, (1 << 55) + 1, (1 << 64) - 1])
@pytest.mark.parametrize("kind", [IN, OUT])
def test_5_2_6_sector_past_the_end_or_wrapping(guest: Guest, image: Path, kind: int, sector: int) -> None:
    before = image.read_bytes()
    readable = [header(kind, sector)] + ([b"x" * 512] if kind == OUT else [])
    assert guest.io(readable, [1] if kind == OUT else [512, 1])[0] == IOERR
    assert guest.alive() and image.read_bytes() == before


@pytest.mark.parametrize("length", [1, 511, 513, 1023])
def test_5_2_6_length_not_a_multiple_of_512(guest: Guest, image: Path, length: int) -> None:
    before = image.read_bytes()
    assert guest.read(0, length)[0] == IOERR
    assert guest.write(0, b"x" * length) == IOERR
    assert guest.alive() and image.read_bytes() == before


def test_5_2_6_partly_past_the_end_transfers_nothing(guest: Guest, image: Path) -> None:
    before = image.read_bytes()
    assert guest.read(127, 1024) == (IOERR, bytes(1024))
    assert guest.write(127, b"x" * 1024) == IOERR
    assert image.read_bytes() == before


@pytest.mark.parametrize("size", [1, 8, 15])
def test_5_2_6_short_header(guest: Guest, size: int) -> None:
    assert guest.io([header(IN)[:size]], [512, 1])[0] == IOERR
    assert guest.alive()


def test_5_2_6_no_header_at_all(guest: Guest) -> None:
    assert guest.io([], [512, 1])[0] == IOERR
    assert guest.alive()


@pytest.mark.parametrize("readable", [[header(IN)], [header(OUT), b"x" * 512], [header(FLUSH)], [b"x"]])
def test_5_2_6_no_status_byte_needs_a_reset(guest: Guest, readable: list[bytes]) -> None:
    request = guest.submit(readable, [])
    assert not request.done and guest.driver.needs_reset
    guest.driver.start()
    assert guest.alive()


def test_5_2_6_header_in_a_writable_descriptor(guest: Guest) -> None:
    """Direction decides, not position: this is a request without a header."""
    ram = guest.driver.ram
    ring = guest.driver.queues[0]
    pieces = [Piece(ram.put(header(IN)), 16), Piece(ram.alloc(512), 512), Piece(ram.alloc(1), 1)]
    request = ring.add_pieces([], pieces)
    ring.kick()
    guest.device.settle()
    ring.reap()
    assert request.result()[-1] == IOERR
    assert guest.alive()


def test_2_7_4_2_readable_behind_writable(guest: Guest) -> None:
    ram, ring = guest.driver.ram, guest.driver.queues[0]
    ring.write_desc(0, ram.alloc(1), 1, NEXT | WRITE, 1)
    ring.write_desc(1, ram.put(header(IN)), 16, 0, 0)
    ring.offer(0)
    ring.kick()
    guest.device.settle()
    assert guest.driver.needs_reset
    guest.driver.start()
    assert guest.alive()


@pytest.mark.parametrize("address", [0, 1 << 63, (1 << 64) - 256, 0x1C0D_0000])
def test_data_outside_of_memory_or_in_a_register_window(guest: Guest, address: int) -> None:
    ram, ring = guest.driver.ram, guest.driver.queues[0]
    status = ram.alloc(1)
    ring.add_pieces([Piece(ram.put(header(IN)), 16)], [Piece(address, 512), Piece(status, 1)])
    ring.kick()
    guest.device.settle()
    assert guest.driver.needs_reset and not guest.device.ctx.faults
    guest.driver.start()
    assert guest.alive()


def test_overlapping_descriptors_cannot_ask_for_more_than_a_bound(disk: Disk, start: Start) -> None:
    guest = start(disk(hostdev="memory:1G"))
    ram, ring = guest.driver.ram, guest.driver.queues[0]
    ring.indirect = True
    data = Piece(ram.alloc(1 << 20), 1 << 20)
    status = Piece(ram.alloc(1), 1)
    ring.add_pieces([Piece(ram.put(header(IN)), 16)], [data] * 65 + [status])
    ring.kick()
    guest.device.settle()
    assert guest.device.memory.read(status.address, 1) == bytes([IOERR])
    assert guest.alive()


def test_data_that_overlaps_the_rings_and_the_header(guest: Guest) -> None:
    """The guest may let its own rings be overwritten; the VM lives."""
    ram, ring = guest.driver.ram, guest.driver.queues[0]
    head = ram.put(header(IN, 1))
    ring.add_pieces([Piece(head, 16)], [Piece(ring.desc, 4096), Piece(head, 1)])
    ring.kick()
    guest.device.settle()
    guest.driver.reset()
    guest.driver = MmioDriver.of(guest.device)
    guest.driver.start()
    assert guest.alive()


def test_flush_with_data_get_id_without_room(guest: Guest) -> None:
    assert guest.io([header(FLUSH, 1 << 40), b"x" * 100], [50, 1])[0] == OK
    for room in ([1], [19, 1], [21, 1], [512, 1]):
        assert guest.io([header(GET_ID)], room)[0] == IOERR
    assert guest.alive()


def test_reset_with_requests_in_the_ring(guest: Guest) -> None:
    for _ in range(20):
        for _ in range(40):
            guest.driver.queues[0].add([header(IN, 1)], [512, 1])
        guest.driver.queues[0].kick()
        guest.driver = MmioDriver.of(guest.device)
        guest.driver.start()
    assert guest.alive()


@given(
    readers=st.lists(st.binary(max_size=40) | SEGMENTS, max_size=4),
    writers=st.lists(st.sampled_from([0, 1, 2, 20, 21, 511, 512, 513, 1024]), max_size=4),
    kind=st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99]),
    sector=st.sampled_from([0, 1, 127, 128, (1 << 64) - 1]),
)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_any_chain_is_answered_or_needs_a_reset(
    start: Start, readers: list[bytes], writers: list[int], kind: int, sector: int
) -> None:
    with plug(VirtioBlk, hostdev="memory:64K") as device:
        guest = start(device)
        request = guest.submit([header(kind, sector), *readers], writers)
        assert request.done or guest.driver.needs_reset
        if request.done:
            assert request.result()[-1] in (0, 1, 2)
            assert request.length is not None and request.length <= sum(writers)
        guest.driver.start()
        assert guest.alive()


class HostileGuest(VirtioAbuse):
    """Anything at all, over the registers and the rings."""

    def device(self) -> Plugged[Any]:
        return plug(VirtioBlk, hostdev="memory:64K")

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[0].submit([header(IN, 1)], [512, 1])
        device.settle()
        driver.queues[0].reap()
        assert request.length == 513 and request.result()[-1] == OK


TestHostileGuest = HostileGuest.TestCase
