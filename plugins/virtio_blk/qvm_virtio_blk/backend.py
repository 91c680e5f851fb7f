"""Where the bytes of a disk are: a host file, a block device, or memory. Knows no virtio.

``read`` and ``write`` move bytes between the disk and views of guest memory without a copy in
between. Thread: the device's worker, and a vCPU as its visitor for ``read_now`` and ``write_now``;
``flush`` and ``close`` also the thread of the VM's end.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

from qvm_virtio_blk.holes import Holes

#: Most buffers of one preadv or pwritev call.
IOV_MAX = os.sysconf("SC_IOV_MAX")
#: The same flag for reads and writes, though Python's os names it for reads only.
RWF_NOWAIT = os.RWF_NOWAIT


class Backend(Protocol):
    """A disk of ``size`` bytes. Ranges must lie inside it; the request parser sees to that.

    ``can_discard`` tells whether blocks can be given back, in pieces of ``granularity`` bytes,
    ``quick`` whether ``read_now`` and ``write_now`` are worth a try.
    """

    size: int
    can_discard: bool
    granularity: int
    quick: bool

    def measure(self) -> int:
        """The size in bytes now: somebody may have changed it. Cheap; does not touch ``size``."""

    def read(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        """Fill ``views``, ``length`` bytes in all, from ``offset``. Raises OSError."""

    def read_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """As ``read`` if that takes no waiting, else False. ``views`` may have changed all the same."""

    def write(self, offset: int, length: int, views: Sequence[memoryview], *, durable: bool = False) -> None:
        """Store ``views`` at ``offset``; when ``durable``, on stable storage. Raises OSError."""

    def write_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """As ``write`` if that hardly ever waits, else False. A part may have been stored all the same."""

    def discard(self, offset: int, length: int) -> None:
        """Give the blocks of the range back if possible; its contents are undefined. Raises OSError."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Have the range read as zeros, as a hole if ``unmap`` and possible. Raises OSError."""

    def flush(self) -> None:
        """Return once everything written is on stable storage. Raises OSError."""

    def close(self) -> None:
        """Give the disk and its lock back; idempotent. Later calls raise OSError."""


class FileBackend:
    """A file or block device behind ``fd``, which it owns; a lock on ``fd`` goes with it."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._fd = fd
        self._holes = Holes(fd, size)
        self.can_discard = self._holes.can_discard
        self.granularity = self._holes.granularity
        # Once the kernel says that the file cannot do a write of its own durability, never ask again.
        self._dsync = os.RWF_DSYNC
        # Local file systems can say that a page is not in memory; what cannot may be far away.
        self.quick = _tells_waiting(fd)
        self._nowait = RWF_NOWAIT

    def measure(self) -> int:
        """See Backend. Works for block devices too, and there it is what BLKGETSIZE64 says."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def read(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        """See Backend."""
        # One call does it, nearly always; what follows a short one is rare and may be slow.
        if len(views) <= IOV_MAX:
            done = os.preadv(self._fd, views, offset)
            if done == length:
                return
        else:
            done = 0
        while done < length:
            count = os.preadv(self._fd, _rest(views, done), offset + done)
            if not count:
                # Somebody truncated the image under the running guest.
                raise OSError(errno.EIO, f"the image ends at byte {offset + done}")
            done += count

    def read_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """See Backend."""
        return os.preadv(self._fd, views, offset, RWF_NOWAIT) == length

    def write_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """See Backend."""
        try:
            return os.pwritev(self._fd, views, offset, self._nowait) == length
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not self._nowait:
                raise
        # ext4 knows this of reads only. A write goes into the page cache; that it waits is rare, and
        # then the framework sees to it that the next ones are the worker's.
        self._nowait = 0
        return self.write_now(offset, length, views)

    def write(self, offset: int, length: int, views: Sequence[memoryview], *, durable: bool = False) -> None:
        """See Backend."""
        if durable and not self._dsync:
            self.write(offset, length, views)
            self.flush()
            return
        done = 0
        while done < length:
            part = views if not done and len(views) <= IOV_MAX else _rest(views, done)
            try:
                done += os.pwritev(self._fd, part, offset + done, self._dsync if durable else 0)
            except OSError as error:
                if not durable or error.errno != errno.EOPNOTSUPP:
                    raise
                self._dsync = 0
                self.write(offset, length, views, durable=True)
                return

    def discard(self, offset: int, length: int) -> None:
        """See Backend."""
        self._holes.discard(self._fd, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See Backend."""
        self._holes.write_zeroes(self._fd, offset, length, unmap)

    def flush(self) -> None:
        """See Backend."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """See Backend."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class ClosedBackend:
    """Stands for a disk that is not open yet, or no more: no bytes, and nothing works."""

    can_discard = True
    granularity = 4096
    quick = False

    def __init__(self) -> None:
        self.size = 0

    def measure(self) -> int:
        """See Backend."""
        return 0

    def read(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        """See Backend."""
        raise _not_open()

    def read_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """See Backend."""
        return False

    def write(self, offset: int, length: int, views: Sequence[memoryview], *, durable: bool = False) -> None:
        """See Backend."""
        raise _not_open()

    def write_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """See Backend."""
        return False

    def discard(self, offset: int, length: int) -> None:
        """See Backend."""
        raise _not_open()

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See Backend."""
        raise _not_open()

    def flush(self) -> None:
        """See Backend."""
        raise _not_open()

    def close(self) -> None:
        """There is nothing to close."""


class MemoryBackend:
    """A RAM disk of ``size`` zeroed bytes; gone when the VM ends. Pages cost memory once touched."""

    can_discard = True
    granularity = mmap.PAGESIZE
    quick = True

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._map)

    def measure(self) -> int:
        """Nobody can change it."""
        return self.size

    def read(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        """See Backend."""
        disk = self._view
        for view in views:
            end = offset + len(view)
            view[:] = disk[offset:end]
            offset = end

    def read_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """See Backend."""
        self.read(offset, length, views)
        return True

    def write(self, offset: int, length: int, views: Sequence[memoryview], *, durable: bool = False) -> None:
        """See Backend. Memory is never durable."""
        disk = self._view
        for view in views:
            end = offset + len(view)
            disk[offset:end] = view
            offset = end

    def write_now(self, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """See Backend."""
        self.write(offset, length, views)
        return True

    def discard(self, offset: int, length: int) -> None:
        """Give whole pages back; they read as zeros."""
        start, end = _pages(offset, length)
        if start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See Backend."""
        start, end = _pages(offset, length)
        if unmap and start < end:
            self.discard(offset, length)
            self._view[offset:start] = bytes(start - offset)
            offset, length = end, offset + length - end
        self._view[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        """There is nothing behind the memory."""

    def close(self) -> None:
        """See Backend."""
        self._view.release()
        self._map.close()


def _tells_waiting(fd: int) -> bool:
    """Whether a read may be asked not to wait. What the first byte is does not matter."""
    try:
        os.preadv(fd, [bytearray(1)], 0, RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _not_open() -> OSError:
    return OSError(errno.ENODEV, "the disk is not open")


def _pages(offset: int, length: int) -> tuple[int, int]:
    """The bounds of the whole pages inside of a range; no page when they cross."""
    page = mmap.PAGESIZE
    return -(-offset // page) * page, (offset + length) // page * page


def _rest(views: Sequence[memoryview], skip: int) -> list[memoryview]:
    """At most IOV_MAX views of what is left behind the first ``skip`` bytes."""
    part: list[memoryview] = []
    for view in views:
        if skip >= len(view):
            skip -= len(view)
            continue
        part.append(view[skip:] if skip else view)
        skip = 0
        if len(part) == IOV_MAX:
            break
    return part
