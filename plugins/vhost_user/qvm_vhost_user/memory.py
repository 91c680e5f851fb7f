"""The memory a client shares: where it is for the guest, for the client, and in which file.

Everything a client says about it is checked before anything is mapped. Changes reach a running device
through ``change``, which keeps it out of guest memory meanwhile. Thread: the session's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from qvm_vhost_user.protocol import MEM_SLOTS, REGION, SINGLE, TABLE
from qvm_vhost_user.wire import Fd
from qvmcore.api import ClientError, GuestError, GuestMemory, HostError, MemoryRegion

_TOP = 1 << 64


class Place(NamedTuple):
    """A region as a message describes it: guest and client addresses, bytes, offset in its file."""

    guest: int
    size: int
    user: int
    offset: int

    def __str__(self) -> str:
        return f"memory [{self.guest:#x}, +{self.size:#x})"

    def check(self) -> None:
        """Raises ClientError for a region that is empty or wraps."""
        if not self.size:
            raise ClientError(f"{self} is empty")
        for what, start in (("guest", self.guest), ("client", self.user), ("file", self.offset)):
            if start + self.size > _TOP:
                raise ClientError(f"{self} goes beyond the end of the {what} addresses, from {start:#x} on")

    def overlaps(self, other: Place) -> bool:
        """Whether a guest or a client address is in both."""
        return _overlap(self.guest, other.guest, self.size, other.size) or _overlap(
            self.user, other.user, self.size, other.size
        )


def parse_table(payload: bytes) -> list[Place]:
    """The regions of SET_MEM_TABLE. Raises ClientError when there are not as many as it says."""
    count, _ = TABLE.unpack_from(payload)
    room = (len(payload) - TABLE.size) // REGION.size
    # There are clients that always send the whole structure, whatever the number.
    if count > room:
        raise ClientError(f"SET_MEM_TABLE announces {count} regions, its length is that of {room}")
    return [Place(*REGION.unpack_from(payload, TABLE.size + REGION.size * index)) for index in range(count)]


def parse_single(payload: bytes) -> Place:
    """The region of ADD_MEM_REG or REM_MEM_REG."""
    _, *fields = SINGLE.unpack(payload)
    return Place(*fields)


class Change(Protocol):
    """``VirtioState.remap``: calls ``change`` with the device out of guest memory. Raises HostError."""

    def __call__(self, change: Callable[[], None], *, in_parts: bool = False) -> None:
        """``in_parts``: what running rings are in may go, and come back by another change."""


class MemoryTable:
    """The regions a client has shared, in ``memory``."""

    def __init__(self, memory: GuestMemory, change: Change) -> None:
        self._memory = memory
        self._change = change
        self._regions: dict[Place, MemoryRegion] = {}

    def replace(self, places: Sequence[Place], fds: Sequence[Fd]) -> None:
        """SET_MEM_TABLE: these regions and no others. Raises ClientError; the old ones stay then."""
        if len(fds) != len(places):
            raise ClientError(f"SET_MEM_TABLE has {len(places)} regions and came with {len(fds)} descriptors")
        for index, place in enumerate(places):
            place.check()
            _refuse_overlap(place, places[:index])
        added: dict[Place, MemoryRegion] = {}
        try:
            for place, fd in zip(places, fds, strict=True):
                added[place] = _map(place, fd)
            self._apply(added)
        except BaseException:
            _close(added.values())
            raise

    def add(self, place: Place, fd: Fd) -> None:
        """ADD_MEM_REG: one more. Raises ClientError."""
        if len(self._regions) >= MEM_SLOTS:
            raise ClientError(f"{place} is one more than the {MEM_SLOTS} slots of GET_MAX_MEM_SLOTS")
        place.check()
        _refuse_overlap(place, self._regions)
        region = _map(place, fd)
        try:
            self._apply({**self._regions, place: region}, in_parts=True)
        except BaseException:
            region.close()
            raise

    def remove(self, place: Place) -> None:
        """REM_MEM_REG: one less, known by its guest address, client address and size. Raises ClientError.

        Running rings may be in it: QEMU takes regions away to add them again in other pieces.
        """
        for known in self._regions:
            if known[:3] == place[:3]:
                rest = {key: region for key, region in self._regions.items() if key != known}
                self._apply(rest, in_parts=True)
                return
        raise ClientError(f"{place} at client address {place.user:#x} cannot leave: it is not there")

    def guest_address(self, user: int) -> int:
        """Where a client address is for the guest. Raises GuestError outside of all regions."""
        for place in self._regions:
            if 0 <= user - place.user < place.size:
                return place.guest + user - place.user
        raise GuestError(f"client address {user:#x} is in no region of the memory table")

    def _apply(self, regions: dict[Place, MemoryRegion], *, in_parts: bool = False) -> None:
        try:
            self._change(lambda: self._memory.replace(regions.values()), in_parts=in_parts)
        except HostError as error:
            raise ClientError(f"memory cannot change: {error}") from error
        kept = set(map(id, regions.values()))
        old, self._regions = self._regions, regions
        _close(region for region in old.values() if id(region) not in kept)


def _overlap(one: int, other: int, one_size: int, other_size: int) -> bool:
    return one < other + other_size and other < one + one_size


def _refuse_overlap(place: Place, others: Iterable[Place]) -> None:
    for other in others:
        if place.overlaps(other):
            raise ClientError(f"{place} at client {place.user:#x} overlaps {other} at client {other.user:#x}")


def _map(place: Place, fd: Fd) -> MemoryRegion:
    try:
        return MemoryRegion.adopt(place.guest, place.size, fd.take(), place.offset)
    except HostError as error:
        raise ClientError(f"{place}: {error}") from error


def _close(regions: Iterable[MemoryRegion]) -> None:
    for region in regions:
        region.close()
