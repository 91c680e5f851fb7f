"""Every way from this package to the kernel, in one object that tests replace."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from pathlib import Path

_MAP_FIXED = 0x10
Argument = int | bytearray | ctypes.Structure


class Kernel:
    """The real one. Methods raise OSError; any thread."""

    #: Where the file systems of the kernel are.
    sys = Path("/sys")
    dev = Path("/dev/vfio")
    proc = Path("/proc")
    #: What another process calls to take over devices of this kernel: ``module:function``.
    adopt = "qvm_vfio.hardware:adopt"

    def open(self, path: Path) -> int:
        """A descriptor of a device file, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: Argument = 0) -> int:
        """A call; a structure is read by the kernel and filled in."""
        return fcntl.ioctl(fd, request, argument)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Bytes of a region."""
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write bytes of a region."""
        return os.pwrite(fd, data, offset)

    def mmap(self, fd: int, size: int, offset: int) -> mmap.mmap:
        """A part of a region as memory."""
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def cover(self, address: int, size: int) -> None:
        """Put nothing in the place of mapped pages: whoever touches them from now on has an error."""
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        if libc.mmap(address, size, 0, fixed, -1, 0) != address:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def write_sysfs(self, path: Path, text: str) -> None:
        """Tell a driver or a device something."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
