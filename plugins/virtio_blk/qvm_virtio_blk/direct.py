"""Direct I/O: the disk's bytes past the host's page cache (O_DIRECT), as far as alignment permits."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Callable, Sequence

from qvm_virtio_blk.backend import IOV_MAX, FileBackend

#: What positions and lengths have to be multiples of, bytes: the smallest that works is used.
_ALIGNMENTS = (512, 4096)
#: Bytes moved at once for a guest whose buffers lie askew.
_BOUNCE = 1 << 20
#: A full disk is no failure of direct I/O.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DirectBackend(FileBackend):
    """A file or block device whose reads, and ``writes`` if wanted, go past the page cache.

    A request whose position or length is not aligned goes through the page cache, which the kernel
    keeps coherent; one whose buffers in guest memory are not goes through a bounce buffer. The
    first failure of a direct transfer switches direct I/O off for good, with one line in ``log``,
    and the transfer is repeated through the page cache.
    """

    def __init__(
        self, fd: int, size: int, *, writes: bool, log: logging.LoggerAdapter[logging.Logger]
    ) -> None:
        super().__init__(fd, size)
        self._log = log
        self._writes = writes
        self.quick = False
        self._direct = -1
        self._align = _ALIGNMENTS[-1]
        # Anonymous memory begins at a page, so it is aligned for everything.
        self._bounce = memoryview(mmap.mmap(-1, _BOUNCE))
        try:
            # A descriptor of its own: O_DIRECT belongs to the open file, and the lock to the other one.
            flags = os.O_RDWR if writes else os.O_RDONLY
            self._direct = os.open(f"/proc/self/fd/{fd}", flags | os.O_DIRECT | os.O_CLOEXEC)
            self._align = self._probe()
        except OSError as error:
            self._off(error)

    @property
    def direct(self) -> bool:
        """Whether direct I/O is in use still."""
        return self._direct >= 0

    def read(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        """See Backend."""
        if self._direct < 0 or (offset | length) % self._align or len(views) > IOV_MAX:
            super().read(offset, length, views)
            return
        try:
            done = self._transfer(os.preadv, offset, length, views)
            if done < 0:
                self._read_askew(offset, length, views)
            elif done < length:
                super().read(offset, length, views)
        except OSError as error:
            self._off(error)
            super().read(offset, length, views)

    def write(self, offset: int, length: int, views: Sequence[memoryview], *, durable: bool = False) -> None:
        """See Backend."""
        if not self._writes or self._direct < 0 or (offset | length) % self._align or len(views) > IOV_MAX:
            super().write(offset, length, views, durable=durable)
            return
        try:
            done = self._transfer(os.pwritev, offset, length, views)
            if done < 0:
                self._write_askew(offset, length, views)
            elif done < length:
                super().write(offset, length, views)
        except OSError as error:
            if error.errno in _FULL:
                raise
            self._off(error)
            super().write(offset, length, views)
        if durable:
            self.flush()

    def close(self) -> None:
        """See Backend."""
        super().close()
        if self._direct >= 0:
            direct, self._direct = self._direct, -1
            os.close(direct)

    def _probe(self) -> int:
        """The alignment a read needs. Raises OSError when direct reads do not work."""
        failure = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        for align in _ALIGNMENTS:
            if self.size % align == 0:
                try:
                    os.preadv(self._direct, [self._bounce[:align]], self.size - align)
                    return align
                except OSError as error:
                    failure = error
        raise failure

    def _transfer(
        self, call: Callable[[int, Sequence[memoryview], int], int], offset: int, length: int,
        views: Sequence[memoryview],
    ) -> int:  # fmt: skip
        """Bytes moved in one call, -1 when the kernel wants the buffers aligned. Raises OSError."""
        try:
            return call(self._direct, views, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return -1

    def _read_askew(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        cursor = _Cursor(views)
        while length:
            done = os.preadv(self._direct, [self._bounce[:length]], offset)
            if not done:
                raise OSError(errno.EIO, f"the image ends at byte {offset}")
            cursor.put(self._bounce[:done])
            offset, length = offset + done, length - done

    def _write_askew(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        cursor = _Cursor(views)
        while length:
            part = self._bounce[:length]
            cursor.get(part)
            length -= len(part)
            while len(part):
                done = os.pwritev(self._direct, [part], offset)
                offset, part = offset + done, part[done:]

    def _off(self, error: OSError) -> None:
        if self._direct >= 0:
            direct, self._direct = self._direct, -1
            os.close(direct)
        self._log.warning("direct I/O is off from now on: %s", error.strerror or error)


class _Cursor:
    """A position in a list of views, moved by copying runs of bytes in or out."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = iter(views)
        self._rest = memoryview(b"")

    def _next(self, most: int) -> memoryview:
        while not len(self._rest):
            self._rest = next(self._views)
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece

    def put(self, data: memoryview) -> None:
        """Copy ``data`` into the next bytes of the views."""
        done = 0
        while done < len(data):
            piece = self._next(len(data) - done)
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def get(self, room: memoryview) -> None:
        """Fill ``room`` from the next bytes of the views."""
        done = 0
        while done < len(room):
            piece = self._next(len(room) - done)
            room[done : done + len(piece)] = piece
            done += len(piece)
