"""request.parse: pure, total, and right about every bound (virtio 1.4, 5.2.6)."""

from __future__ import annotations

import struct
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_virtio_blk.request import Request, RequestError, parse
from qvm_virtio_blk.testing import FLUSH, GET_ID, IN, IOERR, OUT, UNSUPP, header

from qvmcore.api import BadDescriptorChain, Chain

CAPACITY = 128 * 512


def chain(readers: list[bytes], writers: list[int]) -> Chain:
    """A chain as a queue makes it: without empty descriptors."""
    parts = [memoryview(bytearray(part)) for part in readers if part]
    room = [memoryview(bytearray(size)) for size in writers if size]
    return Chain(None, 0, parts, sum(map(len, parts)), room, sum(map(len, room)))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """``data`` in pieces, cut at ``places``."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


def test_read_and_write() -> None:
    request = parse(chain([header(IN, 3)], [1024, 1]), CAPACITY, 254)
    assert (request.kind, request.offset, request.length) == (IN, 3 * 512, 1024)
    request = parse(chain([header(OUT, 3), b"x" * 512], [1]), CAPACITY, 254)
    assert (request.kind, request.offset, request.length) == (OUT, 3 * 512, 512)
    assert b"".join(map(bytes, request.views)) == b"x" * 512


@given(st.lists(st.integers(0, 2000)), st.lists(st.integers(0, 2000)), st.sampled_from([IN, OUT]))
@settings(deadline=None)
def test_5_2_6_how_a_request_is_cut_means_nothing(first: list[int], second: list[int], kind: int) -> None:
    data = bytes(range(256)) * 4
    readable = header(kind, 7) + (data if kind == OUT else b"")
    writable = bytes(1025 if kind == IN else 1)
    request = parse(chain(cut(readable, first), [len(part) for part in cut(writable, second)]), CAPACITY, 254)
    assert (request.kind, request.offset, request.length) == (kind, 7 * 512, 1024)
    assert sum(map(len, request.views)) == 1024
    if kind == OUT:
        assert b"".join(map(bytes, request.views)) == data


def test_the_status_byte_is_never_part_of_the_data() -> None:
    shape = chain([header(IN)], [512, 256, 257])
    request = parse(shape, CAPACITY, 254)
    for view in request.views:
        view[:] = b"\xff" * len(view)
    assert [len(view) for view in request.views] == [512, 256, 256]
    assert shape.writers[-1][-1] == 0


@pytest.mark.parametrize(
    ("readers", "writers", "status"),
    [
        ([header(IN, 127)], [1024, 1], IOERR),  # beyond the end
        ([header(IN, 128)], [512, 1], IOERR),  # at the end
        ([header(IN, (1 << 64) - 1)], [512, 1], IOERR),  # sector * 512 leaves 64 bits
        ([header(IN, 1 << 55)], [512, 1], IOERR),  # sector * 512 is 0 modulo 2^64
        ([header(IN)], [1, 1], IOERR),
        ([header(IN)], [511, 1], IOERR),
        ([header(IN)], [513, 1], IOERR),
        ([header(OUT), b"x" * 513], [1], IOERR),
        ([header(OUT, 127), b"x" * 1024], [1], IOERR),
        ([header(IN)[:15]], [512, 1], IOERR),
        ([b""], [512, 1], IOERR),
        ([header(GET_ID)], [19, 1], IOERR),
        ([header(GET_ID)], [21, 1], IOERR),
        ([header(GET_ID)], [1], IOERR),
        ([header(IN)], [512] * 5 + [1], IOERR),  # more than seg_max
        ([header(OUT)] + [b"x" * 512] * 5, [1], IOERR),
        ([header(2)], [512, 1], UNSUPP),  # SCSI command of the legacy interface
        ([header(11)], [1], UNSUPP),  # discard, not offered
        ([header(13)], [1], UNSUPP),  # write zeroes, not offered
        ([header(14)], [1], UNSUPP),  # secure erase, not offered
        ([header(0x8000_0000)], [512, 1], UNSUPP),  # the old barrier bit
        ([header(0xFFFF_FFFF)], [1], UNSUPP),
    ],
)
def test_5_2_6_a_rule_broken_has_its_status(readers: list[bytes], writers: list[int], status: int) -> None:
    with pytest.raises(RequestError) as caught:
        parse(chain(readers, writers), CAPACITY, 4)
    assert caught.value.status == status and caught.value.why


@pytest.mark.parametrize("readers", [[header(IN)], [header(OUT), b"x" * 512], [b"x"], []])
def test_5_2_6_without_room_for_a_status_no_answer_is_possible(readers: list[bytes]) -> None:
    with pytest.raises(BadDescriptorChain):
        parse(chain(readers, []), CAPACITY, 4)


def test_zero_length_requests_touch_nothing_inside_the_disk_only() -> None:
    assert parse(chain([header(IN, 128)], [1]), CAPACITY, 4).length == 0
    with pytest.raises(RequestError):
        parse(chain([header(IN, 129)], [1]), CAPACITY, 4)


def test_flush_ignores_sector_and_data() -> None:
    assert parse(chain([header(FLUSH, 1 << 60), b"junk"], [33, 1]), CAPACITY, 4) == Request(FLUSH, 0, 0, ())


@given(
    st.lists(st.binary(max_size=40), max_size=5),
    st.lists(st.integers(0, 1100), max_size=5),
    st.one_of(st.none(), st.integers(0, 20)),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 6),
)
@settings(deadline=None, max_examples=500)
def test_any_chain_gives_a_request_that_may_be_executed_or_a_refusal(
    readers: list[bytes], writers: list[int], kind: int | None, sector: int, seg_max: int
) -> None:
    if kind is not None:
        readers = [struct.pack("<IIQ", kind, sector & 0xFFFF, sector % 200), *readers]
    try:
        request = parse(chain(readers, writers), CAPACITY, seg_max)
    except (RequestError, BadDescriptorChain):
        return
    assert request.kind in (IN, OUT, FLUSH, GET_ID)
    assert request.offset >= 0 and request.offset + request.length <= CAPACITY
    assert list(accumulate(map(len, request.views), initial=0))[-1] == request.length
    assert len(request.views) <= max(seg_max, 20)
