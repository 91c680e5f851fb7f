"""The packed virtqueue, device side (virtio 1.4, 2.8).

What says that a descriptor is available is loaded before the rest of it, and written last when it
is used; buffer ID and flags of a used descriptor are one store. The event suppression structures
are one 32-bit cell each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from qvmcore.errors import BadDescriptorChain, GuestMemoryError
from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.position import PACKED_FRESH, packed_start
from qvmcore.virtio.ring import LONGEST, RingQueue
from qvmcore.virtio.rings import PackedRings

__all__ = ["PackedQueue", "PackedRings"]

_NEXT, _WRITE, _INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT
_AVAIL, _USED = spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED
_BOTH = _AVAIL | _USED
#: What tells a direct descriptor that is available from everything else.
_KIND = _BOTH | _INDIRECT
#: A used descriptor's flags beside its ID, in the round with the wrap counter at 1, and the changes
#: to it when something was written and in the other round.
_DONE, _WRITTEN, _TURN = _BOTH << 16, _WRITE << 16, _BOTH << 16
_FORMAT = struct.Struct("<QIHH")
_DESCRIPTOR, _ROWS = _FORMAT.unpack_from, _FORMAT.iter_unpack


class PackedQueue(RingQueue):
    """A packed virtqueue; see :class:`RingQueue`.

    ``_slot`` is where the next available descriptor is expected and ``_mark`` the AVAIL and USED
    bits it will have there (2.8.1); ``_used_slot`` and ``_used_flags`` are the same for the next
    used one. The buffer ID is the driver's alone: it is given back as it came.
    """

    __slots__ = (
        "_device_event", "_driver_event", "_flags", "_idle", "_mark", "_reported", "_slot",
        "_table", "_taken", "_used", "_used_cells", "_used_flags", "_used_slot",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        rings: PackedRings,
        memory: GuestMemory,
        features: int,
        interrupt: Callable[[], None],
        on_error: Callable[[BaseException], None],
        again: Callable[[], None],
        position: int = PACKED_FRESH,
    ) -> None:
        super().__init__(index, rings.size, memory, features, interrupt, on_error, again)
        self._map(rings)
        # Both count descriptors without wrapping: _taken the popped ones, _used the pushed ones.
        self._taken, self._used = packed_start(position, rings.size)
        self._reported = self._used  # value of _used at the last notify()
        lap, self._slot = divmod(self._taken, rings.size)
        self._mark = _USED if lap & 1 else _AVAIL
        lap, self._used_slot = divmod(self._used, rings.size)
        self._used_flags = _DONE ^ _TURN if lap & 1 else _DONE
        self._idle = True  # the driver was told to notify us

    def _map(self, rings: PackedRings) -> None:
        self._table = rings.table
        self._flags = rings.flags
        self._used_cells = rings.used
        self._driver_event = rings.driver_event
        self._device_event = rings.device_event

    def rebind(self, rings: PackedRings, memory: GuestMemory) -> None:
        """See :meth:`Virtqueue.rebind`."""
        self._adopt(memory)
        self._map(rings)

    @property
    def position(self) -> int:
        """See :attr:`Virtqueue.position`; both halves."""
        used = self._used_slot | (0x8000 if self._used_flags == _DONE else 0)
        return used << 16 | self._position()

    def pop(self) -> Chain | None:
        """See :meth:`Virtqueue.pop`. The fast path of every device: keep it flat."""
        if self._closed:
            return None
        place = slot = self._slot
        mark = self._mark
        flags = self._flags[slot]
        if flags & _BOTH != mark:
            flags = self._look()
            if not flags:
                return None
        if self._last == self._budget:
            # A driver may offer as fast as the device serves: a queue's worth, then others get a turn.
            self._more = True
            return None
        if self._idle:
            self._hush()
        table = self._table
        size = self.size
        end_of_free = self._used_slot
        # Where the walk must think: at the end of the ring, or of the descriptors not in flight.
        stop = end_of_free if end_of_free > slot else size
        view = self._view
        start, span, ram = self._region
        roms = self._roms
        readers: list[memoryview] = []
        writers: list[memoryview] = []
        readable = writable = 0
        try:
            if slot == end_of_free and self._taken != self._used:
                raise BadDescriptorChain(f"offered while all {size} descriptors are in flight")
            address, length, ident, _ = _DESCRIPTOR(table, slot << 4)
            if flags & _INDIRECT:
                readable, writable = self._walk_table(address, length, flags, readers, writers)
                place += 1
            else:
                while True:
                    # A buffer of no bytes is legal and useless: it is skipped.
                    if flags & _WRITE:
                        if length:
                            writable += length
                            offset = address - start
                            end = offset + length
                            if offset >= 0 and end <= span:
                                writers.append(ram[offset:end])
                            else:
                                writers.append(view(address, length))
                            if roms:
                                self._refuse_rom(address, length)
                    elif writers:
                        raise BadDescriptorChain("device-readable descriptor behind a device-writable one")
                    elif length:
                        readable += length
                        offset = address - start
                        end = offset + length
                        if offset >= 0 and end <= span:
                            readers.append(ram[offset:end])
                        else:
                            readers.append(view(address, length))
                    place += 1
                    if not flags & _NEXT:
                        break
                    if place == stop:
                        if place == size:
                            place = 0
                            mark = self._mark = mark ^ _BOTH
                            stop = end_of_free
                        if place == end_of_free:
                            free = size - self._taken + self._used
                            raise BadDescriptorChain(f"chain longer than the {free} free descriptors")
                    # The driver shows the first descriptor last, so this one is complete (2.8.6).
                    address, length, ident, flags = _DESCRIPTOR(table, place << 4)
                    if flags & _KIND != mark:
                        wrong = "indirect" if flags & _BOTH == mark else "not available"
                        raise BadDescriptorChain(f"descriptor {place}, inside a chain, is {wrong}")
            if readable + writable > spec.CHAIN_BYTES_MAX:
                raise BadDescriptorChain(f"chain of {readable + writable} bytes exceeds 2^32")
        except (BadDescriptorChain, GuestMemoryError) as error:
            self._fail(f"descriptor {slot}: {error}")
        if place == size:
            place = 0
            self._mark = mark ^ _BOTH
        self._slot = place
        self._last += 1
        count = place - slot
        if count <= 0:
            count += size
        self._taken += count
        chain = self._newest = Chain(self, ident, readers, readable, writers, writable, count)
        return chain

    def _walk_table(
        self, address: int, length: int, flags: int, readers: list[memoryview], writers: list[memoryview]
    ) -> tuple[int, int]:
        """The buffers of an indirect table (2.8.7); how many bytes are readable, and writable.

        Every entry counts, whatever its flags but WRITE say; WRITE of the reference means nothing.
        """
        self._check_table(length, flags)
        entries = length >> 4
        if entries > LONGEST:
            raise BadDescriptorChain(f"indirect table of {entries} entries, more than {LONGEST}")
        view = self._view
        start, span, ram = self._region
        roms = self._roms
        readable = writable = 0
        for at, size, _, kind in _ROWS(view(address, length)):
            if not size:
                if writers and not kind & _WRITE:
                    raise BadDescriptorChain("device-readable descriptor behind a device-writable one")
                continue
            offset = at - start
            end = offset + size
            buffer = ram[offset:end] if offset >= 0 and end <= span else view(at, size)
            if kind & _WRITE:
                writable += size
                writers.append(buffer)
                if roms:
                    self._refuse_rom(at, size)
            elif writers:
                raise BadDescriptorChain("device-readable descriptor behind a device-writable one")
            else:
                readable += size
                readers.append(buffer)
        return readable, writable

    def push(self, chain: Chain, written: int | None = None) -> None:
        """See :meth:`Virtqueue.push`. ID and flags are one store, behind that of the length."""
        if self._dead:
            self._drop(chain)
            return
        if written is None:
            written = chain.written
        if not 0 <= written <= chain.writable:
            raise ValueError(f"queue {self.index}: {written} bytes written of {chain.writable} writable")
        if chain._queue is not self:
            self._refuse_push(chain)
            return
        chain._queue = None
        slot = self._used_slot
        cell = slot << 2
        flags = self._used_flags
        if written:
            flags |= _WRITTEN
            if written > 0xFFFFFFFF:
                # The length field has 32 bits; a buffer of exactly 2^32 bytes is under-reported.
                written = 0xFFFFFFFF
        cells = self._used_cells
        cells[cell + 2] = written
        cells[cell + 3] = chain.head | flags
        # One used descriptor for the whole chain; the place of the next is behind it (2.8.6).
        count = chain._count
        slot += count
        if slot >= self.size:
            slot -= self.size
            self._used_flags ^= _TURN
        self._used_slot = slot
        self._used += count
        pushed = self._pushed = self._pushed + 1
        # Everything is back and nothing new is there, as far as one look tells; or a part of a batch is.
        if pushed == self._signal_at or (
            pushed == self._last and self._flags[self._slot] & _BOTH != self._mark
        ):
            self._signal()

    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None:
        """See :meth:`Virtqueue.push_together`: the first one, where the driver looks, is stored last."""
        stores = []
        if self._dead:
            self._drop_all(used)
            return
        for chain, written in used:
            if not self._returned(chain, written):
                continue
            flags = self._used_flags | (_WRITTEN if written else 0)
            stores.append((self._used_slot << 2, min(written, 0xFFFFFFFF), chain.head | flags))
            self._used_slot += chain._count
            if self._used_slot >= self.size:
                self._used_slot -= self.size
                self._used_flags ^= _TURN
            self._used += chain._count
            self._pushed += 1
        for cell, written, mark in reversed(stores):
            self._used_cells[cell + 2] = written
            self._used_cells[cell + 3] = mark

    @property
    def pending(self) -> int:
        """See :attr:`Virtqueue.pending`; a chain that does not end counts until it is popped."""
        if self._closed:
            return 0
        slot, mark, chains, more = self._slot, self._mark, 0, 0
        for _ in range(self.size - self._taken + self._used):
            flags = self._flags[slot]
            if flags & _BOTH != mark:
                break
            more = flags & _NEXT
            chains += not more
            slot += 1
            if slot == self.size:
                slot = 0
                mark ^= _BOTH
        return chains + more

    def reached(self, position: int) -> bool:
        """See :meth:`Virtqueue.reached`; the position is a descriptor and the wrap counter."""
        return not self._closed and position == self._position()

    def _position(self) -> int:
        """Offset and wrap counter of the next available descriptor, as 2.8.10 and 2.9 store them."""
        return self._slot | (0x8000 if self._mark == _AVAIL else 0)

    def _look(self) -> int:
        """Ask to be notified, then look once more: the flags of an available descriptor, or 0.

        A chain offered just before the driver could see that we ask would lie there unnoticed.
        """
        event = self._position() | spec.RING_EVENT_FLAGS_DESC << 16 if self._event_idx else 0
        self._device_event[0] = event
        self._idle = True
        with self._fence:
            pass
        flags: int = self._flags[self._slot]
        return flags if flags & _BOTH == self._mark else 0

    def _hush(self) -> None:
        """No notifications while we serve. With EVENT_IDX the one asked for is past already."""
        self._idle = False
        if not self._event_idx:
            self._device_event[0] = spec.RING_EVENT_FLAGS_DISABLE << 16

    def _wanted(self, new: int) -> bool:
        """Suppression as 2.8.10 says. The reserved value of the flags suppresses nothing."""
        used, old = self._used, self._reported
        self._reported = used
        event: int = self._driver_event[0]
        flags = event >> 16 & 3
        if flags != spec.RING_EVENT_FLAGS_DESC or not self._event_idx:
            return flags != spec.RING_EVENT_FLAGS_DISABLE
        # Two rounds of the ring, one with the wrap counter at 1, one at 0, name every descriptor:
        # how far back is the last one with that name, and is it among the new ones?
        wanted = (event & 0x7FFF) + (0 if event & 0x8000 else self.size)
        return (used - 1 - wanted) % (2 * self.size) < used - old

    def descriptors(self, count: int) -> list[tuple[int, int, int, int]]:
        """The ``count`` descriptors before the next one, as they are: address, length, ID and flags."""
        first = self._slot - count
        return [_DESCRIPTOR(self._table, (first + n) % self.size << 4) for n in range(count)]

    def _rewind(self, chain: Chain) -> None:
        self._taken -= chain._count
        self._slot -= chain._count
        if self._slot < 0:
            self._slot += self.size
            self._mark ^= _BOTH
