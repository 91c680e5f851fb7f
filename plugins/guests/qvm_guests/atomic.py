"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvmcore.api import HostError


@contextmanager
def host_errors(action: str, path: object) -> Iterator[None]:
    """Turn an OSError of the block into one line: what failed, on what, why, and what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space there and run it again; what was downloaded is kept",
            errno.EDQUOT: "free some of your disk quota and run it again; what was downloaded is kept",
            errno.EACCES: "choose a directory you may write to",
            errno.EPERM: "choose a directory you may write to",
            errno.EROFS: "choose a directory you may write to",
            errno.ENOTDIR: "choose a directory, not a file",
            errno.EEXIST: "choose a directory, not a file",
        }
        where = error.filename if isinstance(error.filename, str) else path
        raise HostError.from_os(action, where, error, hint=hints.get(error.errno or 0, "")) from error


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path beside ``path`` to fill; renamed over it at the end, removed on an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file with ``data``."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
