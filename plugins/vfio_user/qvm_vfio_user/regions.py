"""Regions: the BARs and configuration space of the function, and accesses to them.

An access of a size the window takes goes through as it came, as it would on a bus; anything longer or
odd is split into naturally aligned pieces. Handlers are guarded by the core. One thread, the socket's.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from qvm_vfio_user import spec
from qvm_vfio_user.wire import TRANSFER_MAX, Refused
from qvmcore.api import MmioHandler, PciFunction

_CONFIG_ACCESS = frozenset({1, 2, 4})
_LARGEST = 8
_MULTI_MAX = 8


class Regions:
    """The regions of one function; ``config`` answers configuration accesses."""

    def __init__(self, function: PciFunction, config: MmioHandler) -> None:
        self._function = function
        self._config = config
        self._windows = {bar.number: (bar.window.size, bar.window.access) for bar in function.bars}
        self._windows[spec.CONFIG_REGION] = (spec.CONFIG_SIZE, _CONFIG_ACCESS)

    def info(self, payload: bytes) -> bytes:
        """DEVICE_GET_REGION_INFO. Raises Refused."""
        argsz, _, index, _, _, _ = spec.REGION_INFO.unpack(payload)
        if argsz < spec.REGION_INFO.size or index >= spec.REGIONS:
            raise Refused(errno.EINVAL, f"argsz {argsz}, region {index}")
        size, _ = self._windows.get(index, (0, None))
        flags = spec.REGION_READABLE | spec.REGION_WRITABLE if size else 0
        return spec.REGION_INFO.pack(spec.REGION_INFO.size, flags, index, 0, size, 0)

    def read(self, payload: bytes) -> bytes:
        """REGION_READ. Raises Refused."""
        offset, region, count = spec.ACCESS.unpack(payload)
        access = self._check(region, offset, count)
        if count in access:
            return payload + self._read(region, offset, count)
        pieces = (self._read(region, at, size) for at, size in _pieces(offset, count, access))
        return payload + b"".join(pieces)

    def write(self, payload: bytes) -> bytes:
        """REGION_WRITE. Raises Refused."""
        offset, region, count = spec.ACCESS.unpack_from(payload)
        head = spec.ACCESS.size
        if len(payload) != head + count:
            raise Refused(errno.EINVAL, f"a write of {count} bytes with {len(payload) - head} bytes of data")
        self._check(region, offset, count)
        self._store(region, offset, payload[head:])
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
            self._check(region, offset, size)
        for offset, region, size, data in writes:
            self._store(region, offset, data[:size])
        return payload[:head]

    # ---- inside ------------------------------------------------------------------------------------

    def _check(self, region: int, offset: int, count: int) -> frozenset[int]:
        """The sizes of access the region takes. Raises Refused for what is not wholly inside it."""
        if region not in self._windows:
            raise Refused(errno.EINVAL, f"there is no region {region}")
        size, access = self._windows[region]
        if count > TRANSFER_MAX or offset + count > size:
            raise Refused(
                errno.EINVAL, f"[{offset:#x}, +{count:#x}) is not in the {size:#x} bytes of {region}"
            )
        return access

    def _read(self, region: int, offset: int, size: int) -> bytes:
        if region == spec.CONFIG_REGION:
            value = self._config.read(offset, size)
        else:
            value = self._function.bar_read(region, offset, size)
        return value.to_bytes(size, "little")

    def _store(self, region: int, offset: int, data: bytes) -> None:
        _, access = self._windows[region]
        if len(data) in access:
            self._write(region, offset, data)
            return
        for at, size in _pieces(offset, len(data), access):
            self._write(region, at, data[at - offset : at - offset + size])

    def _write(self, region: int, offset: int, data: bytes) -> None:
        value = int.from_bytes(data, "little")
        if region == spec.CONFIG_REGION:
            self._config.write(offset, len(data), value)
        else:
            self._function.bar_write(region, offset, len(data), value)


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
