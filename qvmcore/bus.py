"""The bus: who answers at a guest-physical address (floor 2). Knows no vdev type.

Windows are inserted while the machine is built, then the space is frozen; accesses look up a
sorted table by bisection. An access must lie whole inside one window and have a size the window
allows, else it counts as unsupported and follows the ``unsupported`` policy.

Only what the guest itself moves, the BARs of PCI functions, comes and goes later: ``place`` and
``remove`` build a new table and swap it in, so that lookups on other threads need no lock and see
the old table or the new one, never a mixture.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qvmcore.types import MmioHandler, Window

#: ``(address, size, value)``; ``value`` is None for a read.
UnsupportedHook = Callable[[int, int, int | None], None]
#: base, end, access sizes, read, write.
_Row = tuple[int, int, frozenset[int], Callable[[int, int], int], Callable[[int, int, int], None]]


@dataclass(frozen=True, slots=True)
class Mapped:
    """A window placed at ``base``; ``owner`` names it in errors and listings."""

    base: int
    window: Window
    handler: MmioHandler
    owner: str

    @property
    def end(self) -> int:
        """First address behind the window."""
        return self.base + self.window.size


#: Told of a window.
_Change = Callable[[Mapped], None]


def all_ones(size: int) -> int:
    """What a read of nothing gives: every bit of ``size`` bytes set."""
    return (1 << (8 * size)) - 1


class AddressSpace:
    """A sorted table of windows. Insert and freeze on one thread; everything else on any."""

    def __init__(self, unsupported: UnsupportedHook | None = None) -> None:
        self._mapped: tuple[Mapped, ...] = ()
        self._table: tuple[list[int], list[_Row]] = ([], [])
        self._unsupported = unsupported
        self._frozen = False
        self._change = threading.Lock()
        self._observer: tuple[_Change, _Change] | None = None

    def __iter__(self) -> Iterator[Mapped]:
        return iter(self._mapped)

    def insert(self, base: int, window: Window, handler: MmioHandler, owner: str) -> None:
        """Place a window. Raises ValueError when it overlaps another one or the space is frozen."""
        if self._frozen:
            raise ValueError(f"{owner}: the bus is frozen; windows are placed before the start")
        self.place(base, window, handler, owner)

    def place(self, base: int, window: Window, handler: MmioHandler, owner: str) -> Mapped:
        """Place a window that the guest moves, also while it runs. Raises ValueError on an overlap."""
        new = Mapped(base, window, handler, owner)
        with self._change:
            clash = self.overlap(base, window.size)
            if clash is not None:
                raise ValueError(
                    f"{owner}: [{base:#x}, {new.end:#x}) overlaps {clash.owner} at "
                    f"[{clash.base:#x}, {clash.end:#x})"
                )
            self._swap((*self._mapped, new))
            if self._observer is not None:
                self._observer[0](new)
        return new

    def remove(self, mapped: Mapped) -> None:
        """Take away what :meth:`place` gave; accesses under way may still finish. Idempotent."""
        with self._change:
            others = tuple(other for other in self._mapped if other is not mapped)
            if len(others) == len(self._mapped):
                return
            self._swap(others)
            if self._observer is not None:
                self._observer[1](mapped)

    def observe(self, placed: _Change, removed: _Change) -> None:
        """Tell an engine of every window, those already here first; at most one observer.

        Both are called under the table's lock, on any thread, and must return at once.
        """
        with self._change:
            if self._observer is not None:
                raise ValueError("the bus has an observer already")
            self._observer = (placed, removed)
            for mapped in self._mapped:
                placed(mapped)

    def _swap(self, windows: tuple[Mapped, ...]) -> None:
        self._mapped = tuple(sorted(windows, key=lambda each: each.base))
        rows = [
            (each.base, each.end, each.window.access, each.handler.read, each.handler.write)
            for each in self._mapped
        ]
        self._table = ([row[0] for row in rows], rows)

    def overlap(self, base: int, size: int) -> Mapped | None:
        """The first window that shares a byte with [base, base + size), or None."""
        for other in self._mapped:
            if base < other.end and other.base < base + size:
                return other
        return None

    def freeze(self) -> None:
        """Refuse further inserts; what the guest moves may still be placed and removed."""
        self._frozen = True

    def read(self, address: int, size: int) -> int:
        """Value at ``address``, ``size`` bytes, unsigned. Unsupported reads give all ones."""
        bases, rows = self._table
        index = bisect_right(bases, address) - 1
        if index >= 0:
            base, end, access, read, _ = rows[index]
            if address + size <= end and size in access:
                return read(address - base, size)
        if self._unsupported is not None:
            self._unsupported(address, size, None)
        return all_ones(size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write ``size`` bytes at ``address``. Unsupported writes are dropped."""
        bases, rows = self._table
        index = bisect_right(bases, address) - 1
        if index >= 0:
            base, end, access, _, write = rows[index]
            if address + size <= end and size in access:
                write(address - base, size, value)
                return
        if self._unsupported is not None:
            self._unsupported(address, size, value)
