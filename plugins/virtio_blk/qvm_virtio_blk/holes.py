"""Giving blocks of a file or block device back, and zeroing them without writing zeros (Linux).

Python has no ``fallocate`` with flags, so it comes from the C library. Thread: the disk's worker.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
# linux/fs.h: _IO(0x12, 119) and _IO(0x12, 127), with a uint64_t[2] of offset and length in bytes
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F

#: What a kernel answers for an operation that this file system or device does not have at all.
_NEVER = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY})

#: Smallest range worth giving back for a file: no usual file system has smaller blocks.
_FILE_GRANULARITY = 4096

_ZEROS = bytes(1 << 20)

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int

_Range = Callable[[int, int, int], None]


def _fallocate_range(mode: int) -> _Range:
    def run(fd: int, offset: int, length: int) -> None:
        while _fallocate(fd, mode | _KEEP_SIZE, offset, length):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    return run


def _ioctl_range(number: int) -> _Range:
    def run(fd: int, offset: int, length: int) -> None:
        fcntl.ioctl(fd, number, struct.pack("=QQ", offset, length))

    return run


def _write_zeros(fd: int, offset: int, length: int) -> None:
    while length:
        done = os.pwrite(fd, memoryview(_ZEROS)[:length], offset)
        offset, length = offset + done, length - done


punch_hole = _fallocate_range(_PUNCH_HOLE)
zero_range = _fallocate_range(_ZERO_RANGE)
block_discard = _ioctl_range(_BLKDISCARD)
block_zero = _ioctl_range(_BLKZEROOUT)


class Holes:
    """Discard and write-zeroes for one open descriptor, by the best means the host has.

    ``can_discard`` tells whether blocks can be given back at all, ``granularity`` the smallest range
    in bytes for which that makes sense. A means that proves absent is not tried again.
    """

    def __init__(self, fd: int, size: int) -> None:
        info = os.fstat(fd)
        block = stat.S_ISBLK(info.st_mode)
        self.granularity = _FILE_GRANULARITY
        if block:
            self.granularity = _queue_limit(info.st_rdev, "discard_granularity")
            self.can_discard = _queue_limit(info.st_rdev, "discard_max_bytes") > 0
        else:
            self.can_discard = _punches(fd, size)
        self._discards = [block_discard if block else punch_hole] if self.can_discard else []
        self._unmaps = [punch_hole] if self.can_discard else []
        self._zeroes = [block_zero if block else zero_range]

    def discard(self, fd: int, offset: int, length: int) -> None:
        """Give the range back if that is possible; what is read there afterwards is undefined."""
        _first(self._discards, fd, offset, length)

    def write_zeroes(self, fd: int, offset: int, length: int, unmap: bool) -> None:
        """Have the range read as zeros; with ``unmap`` preferably by giving its blocks back."""
        if unmap and _first(self._unmaps, fd, offset, length):
            return
        if not _first(self._zeroes, fd, offset, length):
            _write_zeros(fd, offset, length)


def _first(means: list[_Range], fd: int, offset: int, length: int) -> bool:
    """Do it by the first of ``means`` that can; False when none can. Forgets those that never will."""
    for way in tuple(means):
        try:
            way(fd, offset, length)
            return True
        except OSError as error:
            if error.errno in _NEVER:
                means.remove(way)
            elif error.errno != errno.EINVAL:  # EINVAL: not for this range, it is not aligned enough
                raise
    return False


def _punches(fd: int, size: int) -> bool:
    """Whether the file system makes holes: asked by a hole behind the end, which changes nothing."""
    try:
        punch_hole(fd, size, _FILE_GRANULARITY)
    except OSError:
        return False  # read-only files say so, too: nobody discards them
    return True


def _queue_limit(device: int, name: str) -> int:
    """A limit of a block device from sysfs, 0 when it tells none; a partition has its disk's."""
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for folder in (base / "queue", base / "../queue"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            continue  # not there: look at the whole disk, and then do without
    return 0
