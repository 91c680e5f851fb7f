"""Opens the disk a ``hostdev`` names: checks for people, size, and the lock against a second VM."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from pathlib import Path

from qvm_virtio_blk.backend import Backend, FileBackend, MemoryBackend
from qvm_virtio_blk.direct import DirectBackend
from qvm_virtio_blk.options import Disk
from qvm_virtio_blk.spec import SECTOR
from qvmcore.api import HostError, nearest

Log = logging.LoggerAdapter[logging.Logger]


def open_disk(
    disk: Disk, base: Path, block_size: int = SECTOR, dio: str = "disable", log: Log | None = None
) -> Backend:
    """Open and lock the file, block device or memory; a relative path starts at ``base``.

    ``dio`` as in the options; with another value than ``disable``, ``log`` hears when it fails.

    Raises HostError with the path, the reason and what to do.

    A writer holds the image alone; read-only users share it. The lock ends with the process,
    however that ends.
    """
    if disk.memory:
        try:
            return MemoryBackend(disk.memory)
        except (OSError, OverflowError, ValueError) as error:
            raise HostError(f"cannot get {disk.memory} bytes of memory for a disk: {error}") from error
    path = base / disk.path
    fd = _open(path, disk.readonly)
    try:
        size = _size(fd, path, block_size)
        _lock(fd, path, disk.readonly)
    except BaseException:
        os.close(fd)
        raise
    if dio == "disable" or log is None:
        return FileBackend(fd, size)
    return DirectBackend(fd, size, writes=dio == "enable" and not disk.readonly, log=log)


def _open(path: Path, readonly: bool) -> int:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise HostError.from_os("open", path, error, hint=_missing_hint(path, error)) from error
    if stat.S_ISDIR(mode):
        raise HostError(f"{path} is a directory, not a disk image")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise HostError(f"{path} is neither a file nor a block device")
    flags = os.O_RDONLY if readonly else os.O_RDWR
    if stat.S_ISBLK(mode) and not readonly:
        # For a block device this means: not mounted here, not part of a RAID or volume group.
        flags |= os.O_EXCL
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            hint = "the host has it mounted or otherwise in use"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not readonly:
            hint = "set readonly = true if the guest need not write"
        else:
            hint = ""
        raise HostError.from_os("open", path, error, hint=hint) from error


def _missing_hint(path: Path, error: OSError) -> str:
    if error.errno != errno.ENOENT:
        return ""
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return f"there is no directory {path.parent}"
    return nearest(path.name, names) or f"make one with: truncate -s 1G {path}"


def _size(fd: int, path: Path, block_size: int) -> int:
    # Works for block devices too, and there it is what BLKGETSIZE64 says.
    size = os.lseek(fd, 0, os.SEEK_END)
    if not size:
        raise HostError(f"{path} is empty", hint=f"give it a size: truncate -s 1G {path}")
    if size % block_size:
        raise HostError(
            f"{path} has {size} bytes, which is not a multiple of {block_size}",
            hint=f"truncate -s %{block_size} {path} adds the missing bytes, if it is a raw image",
        )
    return size


def _lock(fd: int, path: Path, readonly: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        use = "written" if readonly else "used"
        raise HostError(
            f"{path} is being {use} by {_holder(fd)}",
            hint="two VMs may share an image only if both have readonly = true",
        ) from None
    except OSError as error:
        # No locks on this file system: refusing would make such images unusable.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise HostError.from_os("lock", path, error) from error


def _holder(fd: int) -> str:
    """Who holds a lock on the file, as far as /proc tells (another PID namespace hides it)."""
    inode = os.fstat(fd).st_ino
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "another process"
    for line in lines:
        # "1: FLOCK  ADVISORY  WRITE 708 08:01:1835020 0 EOF"; a waiter has "->" behind the number.
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK" or words[5].rpartition(":")[2] != str(inode):
            continue
        pid = words[4]
        if pid == str(os.getpid()):
            return "another disk of this VM"
        try:
            return f"process {pid} ({Path('/proc', pid, 'comm').read_text().strip()})"
        except OSError:
            return f"process {pid}" if int(pid) > 0 else "another process"
    return "another process"
