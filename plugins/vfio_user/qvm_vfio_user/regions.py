"""Regions: the BARs and configuration space of the function, and accesses to them.

An access of a size the window takes goes through as it came, as it would on a bus; anything longer or
odd is split into naturally aligned pieces. Handlers are guarded by the core. One thread, the socket's.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple

from qvm_vfio_user import spec
from qvm_vfio_user.wire import TRANSFER_MAX, Refused
from qvmcore.api import MmioHandler, PciFunction

_CONFIG_ACCESS = frozenset({1, 2, 4})
_LARGEST = 8
_MULTI_MAX = 8


class Region(NamedTuple):
    """What a region takes, and who answers."""

    size: int
    access: frozenset[int]
    handler: MmioHandler


class Regions:
    """The regions of one function; ``config`` answers configuration accesses."""

    def __init__(self, function: PciFunction, config: MmioHandler) -> None:
        self._regions = {
            bar.number: Region(bar.window.size, bar.window.access, bar.handler) for bar in function.bars
        }
        self._regions[spec.CONFIG_REGION] = Region(spec.CONFIG_SIZE, _CONFIG_ACCESS, config)

    def info(self, payload: bytes) -> bytes:
        """DEVICE_GET_REGION_INFO. Raises Refused."""
        argsz, _, index, _, _, _ = spec.REGION_INFO.unpack(payload)
        if argsz < spec.REGION_INFO.size or index >= spec.REGIONS:
            raise Refused(errno.EINVAL, f"argsz {argsz}, region {index}")
        size = self._regions[index].size if index in self._regions else 0
        flags = spec.REGION_READABLE | spec.REGION_WRITABLE if size else 0
        return spec.REGION_INFO.pack(spec.REGION_INFO.size, flags, index, 0, size, 0)

    def read(self, payload: bytes) -> bytes:
        """REGION_READ. Raises Refused."""
        offset, number, count = spec.ACCESS.unpack(payload)
        region = self._find(number, offset, count)
        if count in region.access:
            return payload + region.handler.read(offset, count).to_bytes(count, "little")
        pieces = _pieces(offset, count, region.access)
        return payload + b"".join(_load(region, at, size) for at, size in pieces)

    def write(self, payload: bytes) -> bytes:
        """REGION_WRITE. Raises Refused."""
        offset, number, count = spec.ACCESS.unpack_from(payload)
        head = spec.ACCESS.size
        if len(payload) != head + count:
            raise Refused(errno.EINVAL, f"a write of {count} bytes with {len(payload) - head} bytes of data")
        _store(self._find(number, offset, count), offset, payload[head:])
        return payload[:head]

    def write_multi(self, payload: bytes) -> bytes:
        """REGION_WRITE_MULTI: all writes, or none when one of them is impossible. Raises Refused."""
        head = spec.WRITE_COUNT.size
        (count,) = spec.WRITE_COUNT.unpack_from(payload)
        if len(payload) != head + count * spec.WRITE.size:
            raise Refused(errno.EINVAL, f"{count} writes in {len(payload) - head} bytes")
        writes = list(spec.WRITE.iter_unpack(payload[head:]))
        for offset, region, size, _ in writes:
            if size > _MULTI_MAX:
                raise Refused(errno.EINVAL, f"a write of {size} bytes; one of many has {_MULTI_MAX} at most")
            self._find(region, offset, size)
        for offset, region, size, data in writes:
            _store(self._regions[region], offset, data[:size])
        return payload[:head]

    # ---- inside ------------------------------------------------------------------------------------

    def _find(self, number: int, offset: int, count: int) -> Region:
        """The region of an access. Raises Refused for what is not wholly inside one."""
        region = self._regions.get(number)
        if region is None:
            raise Refused(errno.EINVAL, f"there is no region {number}")
        if count > TRANSFER_MAX or offset + count > region.size:
            raise Refused(
                errno.EINVAL, f"[{offset:#x}, +{count:#x}) is not in the {region.size:#x} bytes of {number}"
            )
        return region


def _load(region: Region, offset: int, size: int) -> bytes:
    """One piece of a longer load; all ones when the window does not take its size."""
    if size not in region.access:
        return b"\xff" * size
    return region.handler.read(offset, size).to_bytes(size, "little")


def _store(region: Region, offset: int, data: bytes) -> None:
    if len(data) in region.access:
        region.handler.write(offset, len(data), int.from_bytes(data, "little"))
        return
    for at, size in _pieces(offset, len(data), region.access):
        if size in region.access:
            piece = data[at - offset : at - offset + size]
            region.handler.write(at, size, int.from_bytes(piece, "little"))


def _pieces(offset: int, count: int, access: frozenset[int]) -> Iterator[tuple[int, int]]:
    """(offset, size) of naturally aligned accesses that make up a longer one, as large as they may be.

    Where no allowed size fits, at odd ends, the piece is one the window refuses: all ones, or dropped.
    """
    end = offset + count
    while offset < end:
        largest = _LARGEST
        while largest > 1 and (offset % largest or offset + largest > end):
            largest //= 2
        size = max((each for each in access if each <= largest), default=largest)
        yield offset, size
        offset += size
