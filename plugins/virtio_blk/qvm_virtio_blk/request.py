"""From a descriptor chain to a checked request (virtio 1.4, 5.2.6). Pure: no I/O, no state.

Everything in a chain is the guest's and may be wrong. The header, and the segments of a discard, are
copied once, before anything is decided upon them, so the guest cannot change its mind between the
check and the use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qvm_virtio_blk.spec import (
    F_DISCARD,
    F_WRITE_ZEROES,
    HEADER,
    ID_BYTES,
    S_IOERR,
    S_UNSUPP,
    SECTOR,
    SEGMENT,
    SEGMENT_UNMAP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from qvmcore.api import BadDescriptorChain, Chain

_HEADER_SIZE = HEADER.size
_header = HEADER.unpack_from
_SECTOR_MASK = SECTOR - 1

#: Largest request in bytes. Descriptors may overlap, so a guest can ask for far more than it has
#: memory; one request must not keep the worker from the end of the VM. Real ones are below 2 MiB.
MAX_REQUEST = 64 << 20

#: Limits of one discard, told in the configuration: 32 ranges of 1 GiB. Giving blocks back is quick.
MAX_DISCARD_SECTORS, MAX_DISCARD_SEG = 1 << 21, 32
#: Limits of one write-zeroes: 4 ranges of 16 MiB, MAX_REQUEST in all, because the host's file system
#: may know no better way than writing the zeros.
MAX_ZEROES_SECTORS, MAX_ZEROES_SEG = 1 << 15, 4


class Segment(NamedTuple):
    """One range of a discard or write-zeroes, in bytes; inside of the disk and multiples of 512."""

    offset: int
    length: int
    unmap: bool


class Request(NamedTuple):
    """A request that may be executed as it stands.

    ``offset`` and ``length`` are bytes on the disk, inside it and multiples of 512; ``views`` are
    guest memory of ``length`` bytes in all: to fill for T_IN and T_GET_ID, to store for T_OUT.
    ``segments`` are the ranges of T_DISCARD and T_WRITE_ZEROES, whose ``length`` is their sum.
    """

    kind: int
    offset: int
    length: int
    views: Sequence[memoryview]
    segments: Sequence[Segment] = ()


class RequestError(Exception):
    """The request breaks a rule; answer ``status``. ``why`` is for the log."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


def parse(chain: Chain, capacity: int, seg_max: int, features: int = 0) -> Request:
    """The request in ``chain`` for a disk of ``capacity`` bytes.

    ``seg_max`` is the largest number of data buffers the driver may use; ``features`` are the
    negotiated ones. Raises RequestError, or BadDescriptorChain when there is not even room for a
    status byte. Reads the header and the segments only.
    """
    readers, writers = chain.readers, chain.writers
    # Nearly every chain of every driver has a header and a status in a descriptor each.
    if readers and writers and len(readers[0]) == _HEADER_SIZE and len(writers[-1]) == 1:
        kind, _, sector = _header(readers[0])
        if kind == T_IN:
            views, length = writers[:-1], chain.writable - 1
        elif kind == T_OUT:
            views, length = readers[1:], chain.readable - _HEADER_SIZE
        else:
            chain.read(_HEADER_SIZE)
            return _other(kind, chain, capacity, features)
    else:
        if not chain.writable:
            raise BadDescriptorChain("virtio-blk request without room for a status byte")
        if chain.readable < _HEADER_SIZE:
            raise RequestError(S_IOERR, f"header of {chain.readable} bytes, not {_HEADER_SIZE}")
        kind, _, sector = _header(chain.read(_HEADER_SIZE))
        if kind == T_IN:
            views, length = chain.room(keep=1), chain.writable - 1
        elif kind == T_OUT:
            views, length = chain.unread(), chain.readable - _HEADER_SIZE
        else:
            return _other(kind, chain, capacity, features)
    offset = sector * SECTOR
    # Python integers do not wrap, so no sector number can pass this check by overflow.
    if length & _SECTOR_MASK or offset + length > capacity or len(views) > seg_max or length > MAX_REQUEST:
        raise RequestError(S_IOERR, _why(offset, length, capacity, len(views), seg_max))
    return Request(kind, offset, length, views)


def _other(kind: int, chain: Chain, capacity: int, features: int) -> Request:
    """A request without data of the disk; the header was read."""
    if kind == T_FLUSH:
        return Request(kind, 0, 0, ())
    if kind == T_GET_ID:
        if chain.writable - 1 != ID_BYTES:
            raise RequestError(S_IOERR, f"room for an ID of {chain.writable - 1} bytes, not {ID_BYTES}")
        return Request(kind, 0, ID_BYTES, chain.room(keep=1))
    if kind == T_DISCARD and features & F_DISCARD:
        return _ranges(kind, chain, capacity, MAX_DISCARD_SEG, MAX_DISCARD_SECTORS)
    if kind == T_WRITE_ZEROES and features & F_WRITE_ZEROES:
        return _ranges(kind, chain, capacity, MAX_ZEROES_SEG, MAX_ZEROES_SECTORS)
    raise RequestError(S_UNSUPP, f"request type {kind:#x} is not supported")


def _ranges(kind: int, chain: Chain, capacity: int, most: int, most_sectors: int) -> Request:
    """A discard or write-zeroes: all of its segments are right, or none is touched."""
    length = chain.readable - _HEADER_SIZE
    if not length or length % SEGMENT.size:
        raise RequestError(S_IOERR, f"segments of {length} bytes, not a multiple of {SEGMENT.size}")
    if length > most * SEGMENT.size:
        raise RequestError(S_IOERR, f"{length // SEGMENT.size} segments, more than {most}")
    segments = []
    known = SEGMENT_UNMAP if kind == T_WRITE_ZEROES else 0
    for sector, count, flags in SEGMENT.iter_unpack(chain.read()):
        if flags & ~known:
            raise RequestError(S_UNSUPP, f"request type {kind} with flags {flags:#x}")
        if count > most_sectors:
            raise RequestError(S_IOERR, f"a segment of {count} sectors, more than {most_sectors}")
        if (sector + count) * SECTOR > capacity:
            raise RequestError(S_IOERR, where(sector * SECTOR, count * SECTOR, capacity))
        # A range of no sectors inside of the disk breaks no rule, and there is nothing to do for it.
        if count:
            segments.append(Segment(sector * SECTOR, count * SECTOR, bool(flags)))
    return Request(kind, 0, sum(segment.length for segment in segments), (), segments)


def _why(offset: int, length: int, capacity: int, segments: int, seg_max: int) -> str:
    if length & _SECTOR_MASK:
        return f"data of {length} bytes is not a multiple of {SECTOR}"
    if segments > seg_max:
        return f"{segments} data segments, more than seg_max {seg_max}"
    if length > MAX_REQUEST:
        return f"{length} bytes in one request, more than {MAX_REQUEST}"
    return where(offset, length, capacity)


def where(offset: int, length: int, capacity: int) -> str:
    """For the log: what lies outside of the disk."""
    return f"{length} bytes at sector {offset // SECTOR} of {capacity // SECTOR}"
