"""From a descriptor chain to a checked request (virtio 1.4, 5.2.6). Pure: no I/O, no state.

Everything in a chain is the guest's and may be wrong. The header is copied once, before anything
is decided upon it, so the guest cannot change its mind between the check and the use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qvm_virtio_blk.spec import (
    HEADER,
    ID_BYTES,
    S_IOERR,
    S_UNSUPP,
    SECTOR,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
)
from qvmcore.api import BadDescriptorChain, Chain

_HEADER_SIZE = HEADER.size
_header = HEADER.unpack_from
_SECTOR_MASK = SECTOR - 1

#: Largest request in bytes. Descriptors may overlap, so a guest can ask for far more than it has
#: memory; one request must not keep the worker from the end of the VM. Real ones are below 2 MiB.
MAX_REQUEST = 64 << 20


class Request(NamedTuple):
    """A request that may be executed as it stands.

    ``offset`` and ``length`` are bytes on the disk, inside it and multiples of 512; ``views`` are
    guest memory of ``length`` bytes in all: to fill for T_IN and T_GET_ID, to store for T_OUT.
    """

    kind: int
    offset: int
    length: int
    views: Sequence[memoryview]


class RequestError(Exception):
    """The request breaks a rule; answer ``status``. ``why`` is for the log."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


def parse(chain: Chain, capacity: int, seg_max: int) -> Request:
    """The request in ``chain`` for a disk of ``capacity`` bytes.

    ``seg_max`` is the largest number of data buffers the driver may use. Raises RequestError, or
    BadDescriptorChain when there is not even room for a status byte. Reads the header only.
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
            return _other(kind, chain)
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
            return _other(kind, chain)
    offset = sector * SECTOR
    # Python integers do not wrap, so no sector number can pass this check by overflow.
    if length & _SECTOR_MASK or offset + length > capacity or len(views) > seg_max or length > MAX_REQUEST:
        raise RequestError(S_IOERR, _why(offset, length, capacity, len(views), seg_max))
    return Request(kind, offset, length, views)


def _other(kind: int, chain: Chain) -> Request:
    """A request without a place on the disk."""
    if kind == T_FLUSH:
        return Request(kind, 0, 0, ())
    if kind == T_GET_ID:
        if chain.writable - 1 != ID_BYTES:
            raise RequestError(S_IOERR, f"room for an ID of {chain.writable - 1} bytes, not {ID_BYTES}")
        return Request(kind, 0, ID_BYTES, chain.room(keep=1))
    raise RequestError(S_UNSUPP, f"request type {kind:#x} is not supported")


def _why(offset: int, length: int, capacity: int, segments: int, seg_max: int) -> str:
    if length & _SECTOR_MASK:
        return f"data of {length} bytes is not a multiple of {SECTOR}"
    if segments > seg_max:
        return f"{segments} data segments, more than seg_max {seg_max}"
    if length > MAX_REQUEST:
        return f"{length} bytes in one request, more than {MAX_REQUEST}"
    return f"{length} bytes at sector {offset // SECTOR} of {capacity // SECTOR}"
