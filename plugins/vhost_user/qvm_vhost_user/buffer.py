"""The memory of INFLIGHT_SHMFD: made by us, kept by the client, given to the server after us.

It has a part for each queue, one behind the other. How large a part is depends on the size of the queues
alone, so that the format of the rings need not be known when the memory is made.
"""

from __future__ import annotations

from qvm_vhost_user.inflight import QueueInflight, region_size
from qvm_vhost_user.protocol import INFLIGHT
from qvm_vhost_user.wire import Fd
from qvmcore.api import ClientError, GuestError, HostError, MemoryRegion, MemorySpec

#: Largest queue of a device.
QUEUE_SIZE_MAX = 1024


class InflightBuffer:
    """In-flight memory in use by a connection. Thread: the session's."""

    def __init__(self, region: MemoryRegion, offset: int, queues: int, queue_size: int) -> None:
        self._region = region
        self._offset = offset
        self._queues = queues
        self._queue_size = queue_size

    @classmethod
    def create(cls, payload: bytes, queues_max: int) -> InflightBuffer:
        """GET_INFLIGHT_FD: fresh memory for as many queues, and as large ones, as it says."""
        _, _, queues, queue_size = _parse(payload, queues_max)
        try:
            region = MemoryRegion(MemorySpec(0, _part(queue_size) * queues))
        except HostError as error:
            raise GuestError(f"no in-flight memory: {error}") from error
        return cls(region, 0, queues, queue_size)

    @classmethod
    def adopt(cls, payload: bytes, fd: Fd, queues_max: int) -> InflightBuffer:
        """SET_INFLIGHT_FD: memory that was made so. Raises ClientError."""
        size, offset, queues, queue_size = _parse(payload, queues_max)
        needed = _part(queue_size) * queues
        if size < needed:
            raise ClientError(
                f"SET_INFLIGHT_FD has {size} bytes for {queues} queues of {queue_size}, expected {needed}",
                hint="the memory is that of GET_INFLIGHT_FD of the same server",
            )
        try:
            region = MemoryRegion.adopt(0, needed, fd.take(), offset)
        except HostError as error:
            raise ClientError(f"in-flight memory: {error}") from error
        return cls(region, offset, queues, queue_size)

    @property
    def fd(self) -> int:
        """The file behind it; stays ours."""
        return self._region.fd

    def describe(self, size: int) -> bytes:
        """As a message of ``size`` bytes says it."""
        fields = INFLIGHT.pack(self._region.size, self._offset, self._queues, self._queue_size)
        return fields.ljust(size, b"\0")

    def queue(self, index: int, size: int, packed: bool) -> QueueInflight | None:
        """The account of one queue, None for one it has no part for. Raises GuestError for a larger one."""
        if index >= self._queues:
            return None
        if size > self._queue_size:
            raise GuestError(
                f"ring {index} has {size} entries, its in-flight memory was made for {self._queue_size}"
            )
        part = _part(self._queue_size)
        return QueueInflight(self._region.view[part * index : part * (index + 1)], packed=packed, size=size)

    def clear(self) -> None:
        """Forget everything: what it says belongs to a driver that is no more."""
        self._region.view[:] = bytes(self._region.size)

    def close(self) -> None:
        """Unmap it, as soon as no queue uses it; idempotent."""
        self._region.close()


def _parse(payload: bytes, queues_max: int) -> tuple[int, int, int, int]:
    size, offset, queues, queue_size = INFLIGHT.unpack_from(payload)
    if not 1 <= queues <= queues_max or not 1 <= queue_size <= QUEUE_SIZE_MAX:
        raise ClientError(
            f"in-flight memory for {queues} queues of {queue_size}; the device has {queues_max} "
            f"of {QUEUE_SIZE_MAX} at most"
        )
    return size, offset, queues, queue_size


def _part(queue_size: int) -> int:
    return max(region_size(queue_size, packed=packed) for packed in (False, True))
