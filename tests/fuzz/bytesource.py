"""Fuzz input as a stream of decisions, so that every byte string is a valid run of a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class ByteSource:
    """Takes values off the front of ``data``; behind its end everything is zero.

    A mutation of one byte then changes one decision and leaves those before it alone, which is what
    a coverage-guided fuzzer and a shrinker both live on.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether anything is left; the condition of every target's loop."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        part = self._data[self._at : self._at + count]
        self._at += len(part)
        return part

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def uint(self, size: int) -> int:
        """An unsigned little-endian integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def byte(self) -> int:
        """0 to 255."""
        return self.uint(1)

    def pick(self, choices: Sequence[T]) -> T:
        """One of at most 256 choices."""
        return choices[self.byte() % len(choices)]

    def value(self, size: int) -> int:
        """An integer of ``size`` bytes, often one at which code tends to break."""
        kind = self.byte()
        if kind & 0xC0 == 0xC0:
            return self.uint(size)
        if kind & 0xC0 == 0x80:
            return 1 << kind % (8 * size)
        if kind & 0xC0 == 0x40:
            return (1 << kind % (8 * size)) - 1
        return kind & 0x3F
