"""The driver side of a virtqueue, correct by default, malformed on demand (virtio 1.4, 2.6 and 2.7).

The packed format is in :mod:`qvmcore.testing.packed_ring`.
"""

from __future__ import annotations

import abc
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec

_DESC = struct.Struct("<QIHH")
_U16 = struct.Struct("<H")
_ELEMENT = struct.Struct("<II")
_fence = threading.Lock()


def barrier() -> None:
    """Between what a driver publishes and its look at what the device asked for (2.7.13.4.1)."""
    with _fence:
        pass


class GuestRam:
    """Hands out guest-physical buffers from [start, start + size), never twice; for tests that end."""

    def __init__(self, memory: GuestMemory, start: int | None = None, size: int | None = None) -> None:
        region = memory.regions[0]
        self.memory = memory
        self.start = region.start if start is None else start
        self.end = region.end if size is None else self.start + size
        self._next = self.start

    def alloc(self, size: int, align: int = 16) -> int:
        """Address of ``size`` zeroed bytes. MemoryError when there is no room left."""
        address = -(-self._next // align) * align
        if address + size > self.end:
            raise MemoryError(f"no {size} bytes left of the guest memory given to the driver")
        self._next = address + size
        self.memory.write(address, bytes(size))
        return address

    def put(self, data: bytes) -> int:
        """Address of a fresh copy of ``data``."""
        address = self.alloc(len(data))
        self.memory.write(address, data)
        return address

    def mark(self) -> int:
        """A position for :meth:`release`."""
        return self._next

    def release(self, mark: int) -> None:
        """Take back everything handed out since ``mark``."""
        self._next = mark


class Used(NamedTuple):
    """A chain the device gave back: ``id`` is its head or its buffer ID, ``length`` bytes were written."""

    id: int
    length: int


class Piece(NamedTuple):
    """One buffer of a request."""

    address: int
    length: int


@dataclass
class Request:
    """A chain as the driver remembers it; ``length`` is the used length once it came back."""

    head: int
    readable: list[Piece]
    writable: list[Piece]
    descriptors: list[int]
    memory: GuestMemory = field(repr=False)
    length: int | None = None

    @property
    def done(self) -> bool:
        """Whether the device gave it back."""
        return self.length is not None

    def result(self) -> bytes:
        """All device-writable bytes, whatever the used length says."""
        return b"".join(self.memory.read(piece.address, piece.length) for piece in self.writable)


#: ((address, length), flags) of a descriptor.
Row = tuple[tuple[int, int], int]


class RingDriver(abc.ABC):
    """One virtqueue as a driver sees it, whatever its format.

    :meth:`submit` and :meth:`reap` are what a good driver does; ``write_desc``, ``offer`` and
    ``publish`` build anything else. ``notify()`` is called when the device asked to be told.
    ``desc``, ``avail`` and ``used`` are the addresses of the descriptor, driver and device areas.
    """

    desc: int
    avail: int
    used: int

    def __init__(
        self,
        ram: GuestRam,
        size: int,
        features: int = 0,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self.ram = ram
        self.memory = ram.memory
        self.size = size
        self.notify = notify
        self.event_idx = bool(features >> spec.VIRTIO_F_EVENT_IDX & 1)
        self.indirect = False
        self.published = 0
        self.notifications = 0
        self._requests: dict[int, Request] = {}

    # ---- a good driver ---------------------------------------------------------------------

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> Request:
        """Copy the readable pieces into guest memory, make writable ones, and offer the chain.

        Not visible to the device before :meth:`publish`. With ``indirect`` set, the chain goes into
        an indirect table. MemoryError when there are not enough free descriptors.
        """
        pieces = [Piece(self.ram.put(data), len(data)) for data in readable]
        room = [Piece(self.ram.alloc(length), length) for length in writable]
        return self.add_pieces(pieces, room)

    def add_pieces(self, readable: Sequence[Piece], writable: Sequence[Piece]) -> Request:
        """Offer a chain of buffers that exist already."""
        rows: list[Row] = [(piece, 0) for piece in readable]
        rows += [(piece, spec.VIRTQ_DESC_F_WRITE) for piece in writable]
        if not rows or (1 if self.indirect else len(rows)) > self.free:
            raise MemoryError(f"no {len(rows)} free descriptors")
        if self.indirect:
            rows = [(self.indirect_table(rows), spec.VIRTQ_DESC_F_INDIRECT)]
        head, slots = self._place(rows)
        request = Request(head, list(readable), list(writable), slots, self.memory)
        self._requests[head] = request
        return request

    def submit(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> Request:
        """:meth:`add`, :meth:`publish`, and a notification if the device wants one."""
        request = self.add(readable, writable)
        self.kick()
        return request

    def kick(self) -> bool:
        """Publish what was offered and notify unless suppressed; whether it notified."""
        wanted = self._publish_and_look()
        if wanted:
            self.notifications += 1
            self.notify()
        return wanted

    def reap(self) -> list[Request]:
        """The requests that came back since the last call; with EVENT_IDX, asks for the next one.

        AssertionError when the device returned what was never offered, or more than is in flight.
        """
        finished = []
        for element in self.used_elements():
            request = self._requests.pop(element.id, None)
            assert request is not None, f"used element {element} names no chain in flight"
            self._reuse(request)
            request.length = element.length
            finished.append(request)
        if self.event_idx:
            self.set_used_event(self.used_position)
        return finished

    @property
    def in_flight(self) -> int:
        """Requests the device has not given back."""
        return len(self._requests)

    # ---- pieces, for anything else -----------------------------------------------------------

    @abc.abstractmethod
    def write_desc(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Row ``index`` of the table that :meth:`offer` takes chains from."""

    @abc.abstractmethod
    def offer(self, head: int) -> None:
        """Offer the chain that begins at row ``head``, not visible before :meth:`publish`."""

    @abc.abstractmethod
    def publish(self, index: int | None = None) -> None:
        """Show the device what was offered, or as much as makes ``published`` any other value."""

    @abc.abstractmethod
    def indirect_table(self, rows: Sequence[Row]) -> tuple[int, int]:
        """A table of ((address, length), flags) in order: its address and length in bytes."""

    @abc.abstractmethod
    def raw_table(self, rows: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
        """A table of (address, length, flags, next or ID) as they are: its address and length in bytes."""

    @abc.abstractmethod
    def set_no_interrupt(self, off: bool) -> None:
        """Ask for no used buffer notifications at all, or for all."""

    @abc.abstractmethod
    def set_used_event(self, value: int) -> None:
        """With EVENT_IDX, ask for a notification when this place in the ring is used."""

    @abc.abstractmethod
    def used_elements(self) -> list[Used]:
        """The used elements not looked at yet. AssertionError when there are more than entries."""

    @property
    @abc.abstractmethod
    def free(self) -> int:
        """Descriptors a good driver may use now."""

    @property
    @abc.abstractmethod
    def used_idx(self) -> int:
        """How many chains the device gave back, modulo 65536."""

    @property
    @abc.abstractmethod
    def used_position(self) -> int:
        """The place the next used element comes to, as :meth:`set_used_event` takes it."""

    @property
    @abc.abstractmethod
    def position(self) -> int:
        """What a notification tells with NOTIFICATION_DATA (2.9): how far the ring is filled."""

    def read16(self, address: int) -> int:
        """A 16-bit load from guest memory."""
        value: int = _U16.unpack(self.memory.read(address, 2))[0]
        return value

    def write16(self, address: int, value: int) -> None:
        """A 16-bit store to guest memory."""
        self.memory.write(address, _U16.pack(value & 0xFFFF))

    # ---- of the format -------------------------------------------------------------------------

    @abc.abstractmethod
    def _place(self, rows: Sequence[Row]) -> tuple[int, list[int]]:
        """Put a chain into free descriptors and offer it: what names it, and where it is."""

    @abc.abstractmethod
    def _reuse(self, request: Request) -> None:
        """Take the descriptors of a chain that came back."""

    @abc.abstractmethod
    def _publish_and_look(self) -> bool:
        """Publish, then say whether the device wants to be notified of it."""


class SplitDriver(RingDriver):
    """One split virtqueue as a driver sees it (2.7)."""

    def __init__(
        self,
        ram: GuestRam,
        size: int,
        features: int = 0,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(ram, size, features, notify)
        self.desc = ram.alloc(spec.VIRTQ_DESC_SIZE * size, spec.VIRTQ_DESC_ALIGN)
        self.avail = ram.alloc(6 + 2 * size, spec.VIRTQ_AVAIL_ALIGN)
        self.used = ram.alloc(6 + 8 * size, spec.VIRTQ_USED_ALIGN)
        self.avail_idx = 0
        self.last_used = 0
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        """Descriptors a good driver may use now."""
        return len(self._free)

    def _place(self, rows: Sequence[Row]) -> tuple[int, list[int]]:
        slots = [self._free.pop() for _ in rows]
        for position, ((address, length), flags) in enumerate(rows):
            last = position == len(rows) - 1
            more = 0 if last else spec.VIRTQ_DESC_F_NEXT
            following = 0 if last else slots[position + 1]
            self.write_desc(slots[position], address, length, flags | more, following)
        self.offer(slots[0])
        return slots[0], slots

    def _reuse(self, request: Request) -> None:
        self._free.extend(reversed(request.descriptors))

    def _publish_and_look(self) -> bool:
        """2.7.10.1."""
        old, new = self.published, self.avail_idx
        self.publish()
        barrier()
        if self.event_idx:
            event = self.read16(self.used + 4 + 8 * self.size)
            return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self.read16(self.used) & spec.VIRTQ_USED_F_NO_NOTIFY

    def write_desc(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Store a descriptor at ``index`` of the table."""
        row = _DESC.pack(address, length, flags, following)
        self.memory.write(self.desc + spec.VIRTQ_DESC_SIZE * index, row)

    def indirect_table(self, rows: Sequence[Row]) -> tuple[int, int]:
        """A table of ((address, length), flags) linked in order: its address and length in bytes."""
        table = b"".join(
            _DESC.pack(
                address,
                length,
                flags | (spec.VIRTQ_DESC_F_NEXT if number + 1 < len(rows) else 0),
                number + 1 if number + 1 < len(rows) else 0,
            )
            for number, ((address, length), flags) in enumerate(rows)
        )
        return self.ram.put(table), len(table)

    def raw_table(self, rows: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
        """A table of (address, length, flags, next) as they are: its address and length in bytes."""
        table = b"".join(_DESC.pack(*row) for row in rows)
        return self.ram.put(table), len(table)

    def offer(self, head: int) -> None:
        """Store ``head`` into the next available-ring entry, not visible before :meth:`publish`."""
        self.write16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def publish(self, index: int | None = None) -> None:
        """Store the available index, or any other value."""
        self.published = self.avail_idx if index is None else index & 0xFFFF
        self.write16(self.avail + 2, self.published)

    def set_no_interrupt(self, off: bool) -> None:
        """VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.7)."""
        self.write16(self.avail, int(off))

    def set_used_event(self, value: int) -> None:
        """The used_event field (2.7.7)."""
        self.write16(self.avail + 4 + 2 * self.size, value & 0xFFFF)

    @property
    def position(self) -> int:
        """What a notification tells with NOTIFICATION_DATA (2.9): the available index."""
        return self.published

    @property
    def used_position(self) -> int:
        """The used index of the next used element."""
        return self.last_used

    @property
    def avail_event(self) -> int:
        """The avail_event field (2.7.10)."""
        return self.read16(self.used + 4 + 8 * self.size)

    @property
    def used_flags(self) -> int:
        """The flags the device set in the used ring."""
        return self.read16(self.used)

    @property
    def used_idx(self) -> int:
        """The index the device published."""
        return self.read16(self.used + 2)

    def used_elements(self) -> list[Used]:
        """The used elements not looked at yet. AssertionError when there are more than entries."""
        count = (self.used_idx - self.last_used) & 0xFFFF
        assert count <= self.size, f"the used index ran {count} ahead with a queue size of {self.size}"
        elements = []
        for _ in range(count):
            place = self.used + 4 + 8 * (self.last_used % self.size)
            elements.append(Used(*_ELEMENT.unpack(self.memory.read(place, 8))))
            self.last_used = (self.last_used + 1) & 0xFFFF
        return elements
