"""One validated descriptor chain: a request as views of guest memory (virtio 1.4, 2.7.5 and 2.8.5).

A chain is made by a virtqueue, which has checked every address, length and direction. The views
are the guest's own memory: nothing was copied, and a hostile guest may change the bytes at any
time, so read what you decide upon once, with :meth:`Chain.read`, and decide on the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvmcore.virtio.queue import Virtqueue


class Chain:
    """A descriptor chain, from ``queue.pop()`` until ``queue.push(chain)``.

    ``readable`` and ``writable`` are the total bytes of the device-readable and device-writable
    parts; ``readers`` and ``writers`` the memoryviews they consist of, all of them, whatever has
    been read or written already: pass them to ``os.pwritev`` and ``os.preadv``. ``written`` counts
    the bytes that :meth:`write` and :meth:`advance` filled, from the first writable byte on.
    ``head`` is the index of the first descriptor, or the buffer ID of a packed ring. Not thread-safe.

    How a request is cut into descriptors means nothing (2.7.4.1): use :meth:`read`, :meth:`unread`,
    :meth:`room` and :meth:`write_tail`, which see one run of bytes each.
    """

    __slots__ = ("_count", "_queue", "_read", "head", "readable", "readers", "writable", "writers", "written")

    def __init__(
        self,
        queue: Virtqueue | None,
        head: int,
        readers: Sequence[memoryview],
        readable: int,
        writers: Sequence[memoryview],
        writable: int,
        count: int = 1,
    ) -> None:
        self._queue = queue
        self._count = count  # descriptors of a packed ring
        self.head = head
        self.readers = readers
        self.readable = readable
        self.writers = writers
        self.writable = writable
        self.written = 0
        self._read = 0

    def read(self, n: int | None = None) -> bytes:
        """A copy of the next ``n`` readable bytes, of all that are left if None; short at the end."""
        start = self._read
        readers = self.readers
        if n is not None and start == 0 and readers:
            first = readers[0]
            if 0 <= n <= len(first):
                self._read = n
                return first[:n].tobytes()
        left = self.readable - start
        count = left if n is None else min(max(n, 0), left)
        self._read = start + count
        return b"".join(_cut(readers, start, start + count))

    def unread(self) -> list[memoryview]:
        """Views of the readable bytes behind the cursor of :meth:`read`; does not advance it."""
        return _cut(self.readers, self._read, self.readable)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Copy ``data`` behind what is written already; the count copied, short when it is full."""
        start = self.written
        count = min(len(data), self.writable - start)
        source = memoryview(data)
        done = 0
        for view in _cut(self.writers, start, start + count):
            size = len(view)
            view[:] = source[done : done + size]
            done += size
        self.written = start + count
        return count

    def room(self, keep: int = 0) -> list[memoryview]:
        """Views of the writable bytes not written yet, without the last ``keep`` bytes.

        Fill them with ``os.preadv`` and report the count to :meth:`advance` or ``queue.push``.
        """
        writers = self.writers
        if self.written == 0 and writers and len(writers[-1]) == keep:
            return list(writers[:-1])
        return _cut(writers, self.written, self.writable - keep)

    def advance(self, count: int) -> None:
        """Count ``count`` more bytes as written, after they were filled through :meth:`room`."""
        if not 0 <= count <= self.writable - self.written:
            raise ValueError(f"{count} more bytes do not fit behind {self.written} of {self.writable}")
        self.written += count

    def write_tail(self, data: bytes) -> bool:
        """Copy ``data`` into the last writable bytes (a status); False when there is no room for it.

        ``written`` does not change: it counts from the first writable byte.
        """
        size = len(data)
        writers = self.writers
        if writers and size <= len(writers[-1]):
            last = writers[-1]
            last[len(last) - size :] = data
            return True
        if size > self.writable:
            return False
        done = 0
        for view in _cut(writers, self.writable - size, self.writable):
            view[:] = data[done : done + len(view)]
            done += len(view)
        return True


def _cut(views: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """The part [start, end) of the bytes that ``views`` are in a row."""
    part: list[memoryview] = []
    position = 0
    for view in views:
        if position >= end:
            break
        size = len(view)
        behind = position + size
        if behind > start:
            low = start - position if start > position else 0
            high = size if behind <= end else end - position
            part.append(view if low == 0 and high == size else view[low:high])
        position = behind
    return part
