"""The packed virtqueue, device side (virtio 1.4, 2.8).

The descriptor ring is read and written as 64-bit cells, two to a descriptor: the address, and one
that holds length, buffer ID and flags. So what says that a descriptor is available comes with its
length and ID in one load, before the address, and a used descriptor is one store. The event
suppression structures are one 32-bit cell each.
"""

from __future__ import annotations

from collections.abc import Callable

from qvmcore.errors import BadDescriptorChain, GuestMemoryError
from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.ring import RingQueue

_NEXT, _WRITE, _INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT
_AVAIL, _USED = spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED
_BOTH = _AVAIL | _USED
_WRITTEN = _WRITE << 48
#: Exclusive or with this turns the flags of used descriptors into those of the next round.
_TURN = _BOTH << 48


class PackedRings:
    """The three areas of one queue, checked: alignment (2.8.10.1) and place in guest memory.

    Raises BadDescriptorChain or GuestMemoryError. Addresses are guest-physical bytes; ``size`` is
    any number of descriptors, not only a power of two.
    """

    __slots__ = ("cells", "device_event", "driver_event", "size")

    def __init__(self, memory: GuestMemory, size: int, desc: int, driver: int, device: int) -> None:
        for name, address, align in (
            ("descriptor ring", desc, spec.VIRTQ_DESC_ALIGN),
            ("driver event suppression", driver, spec.PVIRTQ_EVENT_ALIGN),
            ("device event suppression", device, spec.PVIRTQ_EVENT_ALIGN),
        ):
            if address % align:
                raise BadDescriptorChain(f"{name} at {address:#x} is not a multiple of {align}")
        self.size = size
        self.cells = memory.view(desc, spec.VIRTQ_DESC_SIZE * size).cast("Q")
        self.driver_event = memory.view(driver, spec.PVIRTQ_EVENT_SIZE).cast("I")
        self.device_event = memory.view(device, spec.PVIRTQ_EVENT_SIZE).cast("I")


class PackedQueue(RingQueue):
    """A packed virtqueue; see :class:`RingQueue`.

    ``_slot`` is where the next available descriptor is expected and ``_mark`` the AVAIL and USED
    bits it will have there (2.8.1); ``_used_slot`` and ``_used_flags`` are the same for the next
    used one. The buffer ID is the driver's alone: it is given back as it came.
    """

    __slots__ = (
        "_cells", "_device_event", "_driver_event", "_idle", "_in_flight", "_mark", "_reported", "_slot",
        "_used", "_used_flags", "_used_slot",
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
    ) -> None:
        super().__init__(index, rings.size, memory, features, interrupt, on_error, again)
        self._cells = rings.cells
        self._driver_event = rings.driver_event
        self._device_event = rings.device_event
        self._slot = self._used_slot = 0
        self._mark = _AVAIL
        self._used_flags = _TURN
        self._in_flight = 0  # descriptors popped and not pushed
        self._used = 0  # descriptors pushed
        self._reported = 0  # value of _used at the last notify()
        self._idle = True  # the driver was told to notify us

    def pop(self) -> Chain | None:
        """See :meth:`Virtqueue.pop`. The fast path of every device: keep it flat."""
        if self._dead:
            return None
        first = slot = self._slot
        mark = self._mark
        cells = self._cells
        word = cells[slot + slot + 1]
        if word >> 48 & _BOTH != mark:
            word = self._look()
            if not word:
                return None
        if self._last == self._budget:
            # A driver may offer as fast as the device serves: a queue's worth, then others get a turn.
            self._more = True
            return None
        if self._idle:
            self._hush()
        size = self.size
        room = size - self._in_flight
        view = self._view
        start, span, ram = self._region
        roms = self._roms
        readers: list[memoryview] = []
        writers: list[memoryview] = []
        readable = writable = entries = 0
        count = 1
        try:
            if not room:
                raise BadDescriptorChain(f"offered while all {size} descriptors are in flight")
            flags = word >> 48
            place = slot
            if flags & _INDIRECT:
                # The reference's own WRITE flag means nothing (2.8.7). Its ID names the buffer.
                self._check_table(word & 0xFFFFFFFF, flags)
                entries = (word & 0xFFFFFFFF) >> 4
                if entries > size:
                    raise BadDescriptorChain(f"indirect table of {entries} entries, queue size {size}")
                cells = view(cells[slot + slot], entries << 4).cast("Q")
                reference, word, place = word, cells[1], 0
                flags = word >> 48
            while True:
                length = word & 0xFFFFFFFF
                # A buffer of no bytes is legal and useless: it is skipped.
                if flags & _WRITE:
                    if length:
                        writable += length
                        address = cells[place + place]
                        offset = address - start
                        if 0 <= offset <= span - length:
                            writers.append(ram[offset : offset + length])
                        else:
                            writers.append(view(address, length))
                        if roms:
                            self._refuse_rom(address, length)
                elif writers:
                    raise BadDescriptorChain("device-readable descriptor behind a device-writable one")
                elif length:
                    readable += length
                    address = cells[place + place]
                    offset = address - start
                    if 0 <= offset <= span - length:
                        readers.append(ram[offset : offset + length])
                    else:
                        readers.append(view(address, length))
                place += 1
                if entries:
                    # Every entry of a table counts, whatever its other flags say (2.8.7).
                    if place == entries:
                        word = reference
                        place = slot + 1
                        break
                    word = cells[place + place + 1]
                    flags = word >> 48
                    continue
                if not flags & _NEXT:
                    break
                if count == room:
                    raise BadDescriptorChain(f"chain longer than the {room} descriptors that are free")
                count += 1
                if place == size:
                    place = 0
                    mark ^= _BOTH
                word = cells[place + place + 1]
                flags = word >> 48
                if flags & _BOTH != mark:
                    raise BadDescriptorChain(f"descriptor {place} of the chain is not available")
                if flags & _INDIRECT:
                    raise BadDescriptorChain("indirect descriptor inside a chain")
            if readable + writable > spec.CHAIN_BYTES_MAX:
                raise BadDescriptorChain(f"chain of {readable + writable} bytes exceeds 2^32")
        except (BadDescriptorChain, GuestMemoryError) as error:
            self._fail(f"descriptor {first}: {error}")
        if place == size:
            place = 0
            mark ^= _BOTH
        self._slot = place
        self._mark = mark
        self._last += 1
        self._in_flight += count
        chain = self._newest = Chain(self, word >> 32 & 0xFFFF, readers, readable, writers, writable)
        chain._count = count
        return chain

    def push(self, chain: Chain, written: int | None = None) -> None:
        """See :meth:`Virtqueue.push`. Length, ID and flags are one store, so none is seen alone."""
        if self._dead:
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
        word = chain.head << 32 | self._used_flags
        if written:
            # The length field has 32 bits; a buffer of exactly 2^32 bytes is under-reported.
            word |= _WRITTEN | min(written, 0xFFFFFFFF)
        self._cells[slot + slot + 1] = word
        # One used descriptor for the whole chain; the place of the next is behind it (2.8.6).
        count = chain._count
        slot += count
        if slot >= self.size:
            slot -= self.size
            self._used_flags ^= _TURN
        self._used_slot = slot
        self._used += count
        self._in_flight -= count
        self._pushed += 1

    @property
    def pending(self) -> int:
        """See :attr:`Virtqueue.pending`; a chain that does not end counts until it is popped."""
        if self._dead:
            return 0
        slot, mark, chains, more = self._slot, self._mark, 0, 0
        for _ in range(self.size - self._in_flight):
            flags = self._cells[slot + slot + 1] >> 48
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
        return not self._dead and position == self._position()

    def _position(self) -> int:
        """Offset and wrap counter of the next available descriptor, as 2.8.10 and 2.9 store them."""
        return self._slot | (0x8000 if self._mark == _AVAIL else 0)

    def _look(self) -> int:
        """Ask to be notified, then look once more: the word of an available descriptor, or 0.

        A chain offered just before the driver could see that we ask would lie there unnoticed.
        """
        event = self._position() | spec.RING_EVENT_FLAGS_DESC << 16 if self._event_idx else 0
        self._device_event[0] = event
        self._idle = True
        with self._fence:
            pass
        slot = self._slot
        word: int = self._cells[slot + slot + 1]
        return word if word >> 48 & _BOTH == self._mark else 0

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

    def _rewind(self, chain: Chain) -> None:
        self._in_flight -= chain._count
        self._slot -= chain._count
        if self._slot < 0:
            self._slot += self.size
            self._mark ^= _BOTH
