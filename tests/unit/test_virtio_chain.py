"""Chain: one run of bytes each way, however the driver cut it (2.7.4.1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvmcore.virtio.chain import Chain

Pieces = list[bytes]


def chain_of(readable: Pieces, writable: list[int]) -> tuple[Chain, list[bytearray]]:
    buffers = [bytearray(length) for length in writable]
    readers = [memoryview(piece) for piece in readable]
    chain = Chain(None, 0, readers, sum(map(len, readable)), [memoryview(b) for b in buffers], sum(writable))
    return chain, buffers


pieces = st.lists(st.binary(min_size=1, max_size=20), max_size=5)
rooms = st.lists(st.integers(1, 20), max_size=5)


@given(pieces, st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=6))
def test_reads_are_those_of_a_file(readable: Pieces, steps: list[int | None]) -> None:
    chain, _ = chain_of(readable, [])
    whole, position = b"".join(readable), 0
    for step in steps:
        wanted = whole[position:] if step is None else whole[position : position + step]
        assert b"".join(chain.unread()) == whole[position:]
        assert chain.read(step) == wanted
        position += len(wanted)
    assert b"".join(chain.readers) == whole


@given(rooms, st.lists(st.binary(max_size=30), max_size=6), st.integers(0, 8), st.binary(max_size=8))
def test_writes_are_those_of_a_file_that_cannot_grow(
    writable: list[int], steps: Pieces, keep: int, tail: bytes
) -> None:
    chain, buffers = chain_of([], writable)
    size, data = sum(writable), b"".join(steps)
    total = 0
    for step in steps:
        done = chain.write(step)
        assert done == min(len(step), size - total)
        total += done
        assert chain.written == total
    assert b"".join(buffers)[:total] == data[:total]
    assert sum(map(len, chain.room(keep))) == max(0, size - keep - total)
    assert sum(map(len, chain.room())) == size - total
    assert chain.write_tail(tail) == (len(tail) <= size)
    if tail and len(tail) <= size:
        assert b"".join(buffers)[-len(tail) :] == tail
    assert chain.written == total


@given(rooms, st.integers(0, 5))
def test_room_is_where_the_next_write_goes(writable: list[int], keep: int) -> None:
    chain, buffers = chain_of([], writable)
    filled = 0
    for view in chain.room(keep):
        view[:] = b"x" * len(view)
        filled += len(view)
    chain.advance(filled)
    assert chain.write(b"y" * keep) == min(keep, sum(writable))
    assert b"".join(buffers) == b"x" * filled + b"y" * min(keep, sum(writable))


def test_room_begins_behind_what_is_written_whatever_is_kept() -> None:
    chain, _ = chain_of([], [4, 1])
    assert [len(view) for view in chain.room(1)] == [4]
    chain.write(b"abc")
    assert [len(view) for view in chain.room(1)] == [1]


def test_a_negative_read_reads_nothing() -> None:
    chain, _ = chain_of([b"abc"], [])
    assert chain.read(-1) == b""
    assert chain.read() == b"abc"


@pytest.mark.parametrize("count", [-1, 6])
def test_advance_cannot_leave_the_chain(count: int) -> None:
    chain, _ = chain_of([], [3, 2])
    with pytest.raises(ValueError, match="do not fit"):
        chain.advance(count)
    chain.advance(5)
    assert chain.written == 5
