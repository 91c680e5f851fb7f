"""What is free in guest memory while a guest is loaded (floor 8).

Everything that is placed takes its range first, so two things never end up on each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qvmcore.errors import QvmError
from qvmcore.load.common import align_up, too_small
from qvmcore.memory import GuestMemory


class _Taken(NamedTuple):
    start: int
    end: int
    what: str


class Room:
    """The free ranges of ``memory``: addresses and sizes are bytes, ROM is never free."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._taken: list[_Taken] = []

    def take(self, what: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Take (address, size) ranges for ``what``. Raises QvmError when one is not free or not memory.

        The ranges of one call may overlap each other: they are one thing.
        """
        new = [_Taken(start, start + size, what) for start, size in ranges if size]
        for each in new:
            size = each.end - each.start
            if not self._memory.contains(each.start, size):
                raise too_small(what, size, each.start, self._memory)
            for other in self._taken:
                if each.start < other.end and other.start < each.end:
                    raise QvmError(
                        f"{what} [{each.start:#x}, {each.end:#x}) and {other.what}"
                        f" [{other.start:#x}, {other.end:#x}) overlap",
                        hint="load the kernel elsewhere",
                    )
        self._taken += new

    def lowest(self, size: int, first: int, below: int, step: int) -> int | None:
        """The lowest multiple of ``step`` in [first, below) with ``size`` free bytes; None without one."""
        for start, end in self._free(first, below):
            address = align_up(start, step)
            if address + size <= end:
                return address
        return None

    def highest(self, size: int, first: int, below: int, step: int) -> int | None:
        """The same from above."""
        for start, end in reversed(self._free(first, below)):
            address = (end - size) // step * step
            if address >= start:
                return address
        return None

    def _free(self, first: int, below: int) -> Sequence[tuple[int, int]]:
        """The free ranges within [first, below), the lowest first."""
        ranges = []
        for region in self._memory.regions:
            if region.rom:
                continue
            start, end = max(region.start, first), min(region.end, below)
            for taken in sorted(self._taken):
                if taken.end <= start or taken.start >= end:
                    continue
                if taken.start > start:
                    ranges.append((start, taken.start))
                start = max(start, taken.end)
            if start < end:
                ranges.append((start, end))
        return ranges
