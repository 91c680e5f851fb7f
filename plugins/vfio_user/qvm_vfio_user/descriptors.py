"""Descriptors that came with a message: owned by an object until somebody takes them."""

from __future__ import annotations

import os
from collections.abc import Iterable


class Descriptors:
    """Open descriptors in the order they came. One thread."""

    __slots__ = ("_fds",)

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def add(self, other: Descriptors) -> None:
        """Append those of ``other``, which has none left then."""
        self._fds += other._fds
        other._fds = []

    def take(self) -> int:
        """The first one, which is the caller's from now on. Raises IndexError."""
        return self._fds.pop(0)

    def close(self) -> None:
        """Close those nobody took; idempotent."""
        while self._fds:
            os.close(self._fds.pop())
