"""Eventfds that somebody else signals, as sources of a function's interrupts (floor 4).

VFIO signals an eventfd for each interrupt of a physical device. While that interrupt may be sent, the
engine listens to the eventfd and no thread of ours has a part in it; where the engine cannot, its owner
watches it. While it may not be sent nobody reads the eventfd, so its count is the pending bit.
"""

from __future__ import annotations

import enum
import os
import select
from collections.abc import Callable, Iterable

#: Ends what an engine listens to: no interrupt comes of it once this returns. Idempotent, never blocks.
Stop = Callable[[], None]


class Way(enum.Enum):
    """Who takes the counts of a source now: nobody, the engine, or its owner."""

    HELD = "held"
    STRAIGHT = "straight"
    WATCHED = "watched"


class Source:
    """``fd`` stays its owner's. ``listen(message)`` asks the engine, which gives None when it cannot.

    ``turned`` is told every change of :attr:`way`; it must neither block nor call back. Not thread-safe.
    """

    def __init__(
        self, fd: int, listen: Callable[[tuple[int, int]], Stop | None], turned: Callable[[Way], None]
    ) -> None:
        self.fd = fd
        self.way = Way.HELD
        self._listen = listen
        self._turned = turned
        self._stop: Stop | None = None
        self._message: tuple[int, int] | None = None

    def go(self, message: tuple[int, int] | None) -> None:
        """From now on it is this message (address, data); None: it is held."""
        if message == self._message:
            return
        if self._stop is not None:
            self._stop()
        self._stop = self._listen(message) if message is not None else None
        self._message = message
        if message is None:
            self._turn(Way.HELD)
        elif self._stop is None:
            self._turn(Way.WATCHED)
        else:
            # The engine has seen what was in it, and leaves it there (KVM_IRQFD polls when it begins).
            _take(self.fd)
            self._turn(Way.STRAIGHT)

    def _turn(self, way: Way) -> None:
        if way is not self.way:
            self.way = way
            self._turned(way)


def waiting(sources: Iterable[tuple[int, Source]]) -> int:
    """The bits of those (number, source) that are held and have a count."""
    held = {source.fd: number for number, source in sources if source.way is Way.HELD}
    if not held:
        return 0
    poll = select.poll()
    for fd in held:
        poll.register(fd, select.POLLIN)
    return sum(1 << held[fd] for fd, events in poll.poll(0) if events & select.POLLIN)


def _take(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass  # there was none
