"""What an engine on KVM does with eventfds it listens to, step by step and without a guest."""

from __future__ import annotations

import os
import select

from qvmcore.pci.sources import Stop


class FakeListening:
    """Listens to at most ``room`` eventfds for messages, 0 by default; ``levels``: also for lines.

    ``attached`` are the messages by eventfd. :meth:`look` is what the kernel does at a signal.
    """

    def __init__(self, messages: list[tuple[int, int]] | None = None, room: int = 0) -> None:
        self.room = room
        self.levels = False
        #: Sent so far, in order.
        self.messages: list[tuple[int, int]] = [] if messages is None else messages
        self.attached: dict[int, tuple[int, int]] = {}
        #: Eventfds to signal when the line was served, by the eventfd that raises it.
        self.lines: dict[int, int] = {}
        self.high: set[int] = set()
        #: How often anything was attached.
        self.attachments = 0

    def listen(self, fd: int, address: int, data: int) -> Stop | None:
        """A count that is in it already is a message, and stays in it."""
        if len(self.attached) >= self.room or fd in self.attached:
            return None
        self.attachments += 1
        self.attached[fd] = (address, data)
        if _counts(fd):
            self.messages.append((address, data))
        return lambda: self._end(fd)

    def listen_level(self, fd: int, resample: int) -> Stop | None:
        """Likewise for a line."""
        if not self.levels:
            return None
        self.attachments += 1
        self.lines[fd] = resample
        if _counts(fd):
            self.high.add(fd)
        return lambda: self._end(fd)

    def look(self) -> None:
        """Take what was signalled."""
        for fd, message in self.attached.items():
            if _counts(fd):
                os.eventfd_read(fd)
                self.messages.append(message)
        for fd in self.lines:
            if _counts(fd):
                os.eventfd_read(fd)
                self.high.add(fd)

    def serve(self) -> None:
        """The guest ends the interrupt of the line."""
        for fd in self.high:
            os.eventfd_write(self.lines[fd], 1)
        self.high.clear()

    def _end(self, fd: int) -> None:
        self.attached.pop(fd, None)
        self.lines.pop(fd, None)
        self.high.discard(fd)


def _counts(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
