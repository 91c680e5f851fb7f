"""The driver side of a packed virtqueue (virtio 1.4, 2.8), correct by default, malformed on demand."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence

from qvmcore.testing.ring import GuestRam, Request, RingDriver, Row, Used, barrier
from qvmcore.virtio import spec

_DESC = struct.Struct("<QIHH")
_BODY = struct.Struct("<QIH")
_EVENT = struct.Struct("<HH")
_NEXT, _WRITE = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE
_AVAIL, _USED = spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED


class PackedDriver(RingDriver):
    """One packed virtqueue as a driver sees it.

    There is no descriptor table to offer chains from, so :meth:`write_desc` keeps rows aside and
    :meth:`offer` copies a chain of them into the ring, with its first row's number as buffer ID.
    :meth:`write_slot` stores anything anywhere.
    """

    def __init__(
        self,
        ram: GuestRam,
        size: int,
        features: int = 0,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(ram, size, features, notify)
        self.desc = ram.alloc(spec.VIRTQ_DESC_SIZE * size, spec.VIRTQ_DESC_ALIGN)
        self.avail = ram.alloc(spec.PVIRTQ_EVENT_SIZE, spec.PVIRTQ_EVENT_ALIGN)
        self.used = ram.alloc(spec.PVIRTQ_EVENT_SIZE, spec.PVIRTQ_EVENT_ALIGN)
        # Descriptors made available, shown to the device, and given back: they count up without
        # wrapping, so the slot is the remainder and the wrap counter the parity of the round.
        self.filled = 0
        self.shown = 0
        self.returned = 0
        self._free = size
        self._ids = list(range(size - 1, -1, -1))
        self._lengths: dict[int, deque[int]] = {}
        self._heads: list[tuple[int, int]] = []
        self._rows: dict[int, tuple[int, int, int, int]] = {}
        self._reaped = 0

    # ---- see RingDriver --------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Descriptors a good driver may use now."""
        return self._free

    def write_desc(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Row ``index`` of the rows :meth:`offer` takes chains from."""
        self._rows[index] = (address, length, flags, following)

    def offer(self, head: int) -> None:
        """Copy the chain that begins at row ``head`` into the ring, as far as it goes, once around."""
        rows: list[Row] = []
        index = head
        while index in self._rows and len(rows) < self.size:
            address, length, flags, index = self._rows[index]
            rows.append(((address, length), flags))
            if not flags & _NEXT:
                break
        self._fill(rows or [((0, 0), 0)], head & 0xFFFF)

    def publish(self, index: int | None = None) -> None:
        """Show what was offered; beyond that, what lies in the ring as if it had been offered."""
        for slot, flags in self._heads:
            self.write16(self.desc + spec.VIRTQ_DESC_SIZE * slot + 14, flags)
        self.published = (self.published + len(self._heads)) & 0xFFFF
        self._heads.clear()
        self.shown = self.filled
        if index is not None:
            for number in range(min((index - self.published) & 0xFFFF, self.size)):
                place = self.desc + spec.VIRTQ_DESC_SIZE * ((self.filled + number) % self.size) + 14
                flags = self.read16(place) & ~(_AVAIL | _USED)
                self.write16(place, flags | self._available(self.filled + number))

    def indirect_table(self, rows: Sequence[Row]) -> tuple[int, int]:
        """2.8.7: the entries follow each other, WRITE is the only flag."""
        return self.raw_table([(address, length, flags, 0) for (address, length), flags in rows])

    def raw_table(self, rows: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
        """A table of (address, length, flags, ID) as they are: its address and length in bytes."""
        table = b"".join(_DESC.pack(address, length, ident, flags) for address, length, flags, ident in rows)
        return self.ram.put(table), len(table)

    def set_no_interrupt(self, off: bool) -> None:
        """RING_EVENT_FLAGS_DISABLE or ENABLE (2.8.10)."""
        self.write_event(0, spec.RING_EVENT_FLAGS_DISABLE if off else spec.RING_EVENT_FLAGS_ENABLE)

    def set_used_event(self, value: int) -> None:
        """RING_EVENT_FLAGS_DESC for an offset with the wrap counter in bit 15 (2.8.10)."""
        self.write_event(value, spec.RING_EVENT_FLAGS_DESC)

    def used_elements(self) -> list[Used]:
        """The used descriptors not looked at yet."""
        elements = []
        while element := self._used_at(self.returned):
            elements.append(element)
            self.returned += self._length_of(element.id, forget=True)
            self._reaped += 1
            assert len(elements) <= self.size, "the device gives back without end"
        return elements

    @property
    def used_idx(self) -> int:
        """How many chains the device gave back, modulo 65536; nothing is taken."""
        position, count = self.returned, self._reaped
        seen: dict[int, int] = {}
        while (element := self._used_at(position)) and count - self._reaped < self.size:
            number = seen[element.id] = seen.get(element.id, -1) + 1
            position += self._length_of(element.id, number)
            count += 1
        return count & 0xFFFF

    @property
    def used_position(self) -> int:
        """Offset and wrap counter of the next used descriptor."""
        return self.name(self.returned)

    @property
    def position(self) -> int:
        """Offset and wrap counter of the next descriptor to be made available (2.9)."""
        return self.name(self.shown)

    # ---- for tests of the format -------------------------------------------------------------------

    def name(self, position: int) -> int:
        """Offset and wrap counter of a position that counts up from 0."""
        return position % self.size | (0x8000 if position // self.size % 2 == 0 else 0)

    def write_slot(self, slot: int, address: int, length: int, ident: int, flags: int) -> None:
        """Store a descriptor into the ring, visible at once."""
        row = _DESC.pack(address, length, ident, flags)
        self.memory.write(self.desc + spec.VIRTQ_DESC_SIZE * slot, row)

    def read_slot(self, slot: int) -> tuple[int, int, int, int]:
        """Address, length, ID and flags of a descriptor of the ring."""
        address, length, ident, flags = _DESC.unpack(
            self.memory.read(self.desc + spec.VIRTQ_DESC_SIZE * slot, spec.VIRTQ_DESC_SIZE)
        )
        return address, length, ident, flags

    def write_event(self, place: int, flags: int) -> None:
        """The driver event suppression structure, as it is stored."""
        self.memory.write(self.avail, _EVENT.pack(place & 0xFFFF, flags & 0xFFFF))

    @property
    def device_event(self) -> tuple[int, int]:
        """The device event suppression structure: offset with wrap counter, and flags."""
        place, flags = _EVENT.unpack(self.memory.read(self.used, spec.PVIRTQ_EVENT_SIZE))
        return place, flags

    # ---- inside ------------------------------------------------------------------------------------

    def _available(self, position: int) -> int:
        return _AVAIL if position // self.size % 2 == 0 else _USED

    def _fill(self, rows: Sequence[Row], ident: int) -> list[int]:
        """Write a chain into the next slots; the first one's flags wait for :meth:`publish` (2.8.6)."""
        slots = []
        for number, ((address, length), flags) in enumerate(rows):
            slot = self.filled % self.size
            place = self.desc + spec.VIRTQ_DESC_SIZE * slot
            self.memory.write(place, _BODY.pack(address, length, ident))
            flags = flags & ~(_AVAIL | _USED) | self._available(self.filled)
            if number:
                self.write16(place + 14, flags)
            else:
                self._heads.append((slot, flags))
            slots.append(slot)
            self.filled += 1
        self._lengths.setdefault(ident, deque()).append(len(rows))
        return slots

    def _place(self, rows: Sequence[Row]) -> tuple[int, list[int]]:
        ident = self._ids.pop()
        self._free -= len(rows)
        last = len(rows) - 1
        return ident, self._fill(
            [(piece, flags | (_NEXT if number < last else 0)) for number, (piece, flags) in enumerate(rows)],
            ident,
        )

    def _reuse(self, request: Request) -> None:
        self._ids.append(request.head)
        self._free += len(request.descriptors)

    def _publish_and_look(self) -> bool:
        """2.8.10: a place asked for is found by looking at each that was filled."""
        new = range(self.shown, self.filled)
        self.publish()
        barrier()
        place, flags = self.device_event
        if flags & 3 == spec.RING_EVENT_FLAGS_DESC:
            return any(self.name(position) == place for position in new)
        return flags & 3 != spec.RING_EVENT_FLAGS_DISABLE

    def _used_at(self, position: int) -> Used | None:
        _, length, ident, flags = self.read_slot(position % self.size)
        wrap = position // self.size % 2 == 0
        if bool(flags & _AVAIL) != wrap or bool(flags & _USED) != wrap:
            return None
        # The length is reserved when nothing was written (2.8.4).
        return Used(ident, length if flags & _WRITE else 0)

    def _length_of(self, ident: int, number: int = 0, forget: bool = False) -> int:
        """How many descriptors the ``number``-th chain in flight with this ID has; 1 for none of ours."""
        lengths = self._lengths.get(ident)
        if lengths is None or number >= len(lengths):
            return 1
        length = lengths[number]
        if forget:
            lengths.popleft()
            if not lengths:
                del self._lengths[ident]
        return length
