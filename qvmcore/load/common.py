"""Reading kernels and initrds (floor 8): straight into guest memory, with errors for people.

Nothing here knows an architecture. A file is never trusted: every range is checked against guest
memory before the first byte is read into it.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from qvmcore.errors import HostError, QvmError
from qvmcore.memory import GuestMemory
from qvmcore.options import format_size

#: Bytes of a file that tell its kind: all headers fit, that of a bzImage ends before 0x300.
HEAD_SIZE = 1024


def open_file(path: Path) -> io.FileIO:
    """Open for reading. Raises HostError."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise HostError.from_os("read", path, error) from error


def read_head(path: Path) -> bytes:
    """The first :data:`HEAD_SIZE` bytes, fewer of a short file. Raises HostError."""
    with open_file(path) as file:
        try:
            return bytes(file.read(HEAD_SIZE))
        except OSError as error:
            raise HostError.from_os("read", path, error) from error


def read_all(path: Path, limit: int) -> bytes:
    """The whole file, of at most ``limit`` bytes. Raises HostError, QvmError for a larger one."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise QvmError(f"{path}: the file ({format_size(size)}) is larger than the guest's RAM")
        return bytes(file.readall())


def file_size(path: Path) -> int:
    """Size in bytes. Raises HostError."""
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


def load_file(path: Path, memory: GuestMemory, start: int, what: str) -> int:
    """Read the whole file to ``start`` without a copy; its size in bytes.

    ``what`` names it in the QvmError for one that does not fit. Raises HostError.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not memory.contains(start, size):
            raise too_small(f"{path}: the {what}", size, start, memory)
        fill(path, file.fileno(), 0, memory.view(start, size))
    return size


def load_part(path: Path, offset: int, view: memoryview) -> None:
    """Fill ``view`` with the file from ``offset`` on. Raises HostError, also when the file ends early."""
    with open_file(path) as file:
        fill(path, file.fileno(), offset, view)


def store(path: Path, memory: GuestMemory, start: int, data: bytes) -> int:
    """Copy a kernel that came out of ``path``; its size in bytes. Raises QvmError."""
    if not memory.contains(start, len(data)):
        raise too_small(f"{path}: the kernel", len(data), start, memory)
    memory.write(start, data)
    return len(data)


def fill(path: Path, fd: int, offset: int, view: memoryview) -> None:
    """Fill ``view`` from the open file. Raises HostError, also when the file ends early."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise HostError.from_os("read", path, error) from error
        if count == 0:
            raise HostError(f"cannot read {path}: the file ends after {offset + done} bytes")
        done += count


def too_small(what: str, size: int, start: int, memory: GuestMemory) -> QvmError:
    """The error for something that does not fit where it has to be."""
    message = f"{what} ({format_size(size)} at {start:#x}) does not fit into RAM"
    return QvmError(message, hint=ram_hint(memory))


def ram_hint(memory: GuestMemory) -> str:
    """What RAM there is, and what to do."""
    regions = ", ".join(f"[{r.start:#x}, {r.end:#x})" for r in memory.regions)
    return f"RAM is {regions}; give the guest more"


def align_up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return (value + step - 1) // step * step
