"""The run directory (floor 8): where the running VMs of a user can be found.

``$XDG_RUNTIME_DIR/qvm/NAME/`` if that variable names a directory of this user, else ``/run/qvm/NAME/``
for root and ``/tmp/qvm-UID/NAME/`` for everybody else. A VM holds a lock on its directory as long as
it lives, which the kernel drops however it ends; so who finds a directory without one may clean it up.
(A child that was forked and never became another program would hold the lock, too.)

A second VM of one name runs as ``NAME.2``, a third as ``NAME.3``: no VM file can ask for such a name.
The directory above is locked, shortly, while a directory is taken or cleaned up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qvmcore.errors import HostError

#: The socket of a VM within its directory.
SOCKET = "control"
_PID = "pid"
#: VMs of one name.
MAX_SAME_NAME = 1000
#: Seconds to wait for another process that takes or cleans up a directory.
LOCK_PATIENCE = 2.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNSAFE = re.compile(r"[^A-Za-z0-9_:+-]")


@dataclass(frozen=True, slots=True)
class RunningVm:
    """A VM that holds its run directory; ``pid`` is 0 when it is not written yet."""

    name: str
    pid: int
    path: Path


class RunDirectory:
    """The directory of one running VM: ``name`` within :func:`base`, open as ``fd`` and locked."""

    def __init__(self, name: str, path: Path, fd: int) -> None:
        self.name = name
        self.path = path
        self.fd = fd

    @classmethod
    def create(cls, name: str) -> RunDirectory:
        """Take the first free name for a VM called ``name``. Raises HostError."""
        # system.name is checked, but a VM without one is called like its file.
        plain = _UNSAFE.sub("_", name)[:64] or "vm"
        top = base()
        with _locked(top, create=True) as above:
            try:
                for number in range(1, MAX_SAME_NAME + 1):
                    directory = cls._take(plain if number == 1 else f"{plain}.{number}", top, above)
                    if directory is not None:
                        return directory
            except OSError as error:
                raise HostError.from_os("make a run directory in", top, error) from error
        raise HostError(f"{MAX_SAME_NAME} VMs called {plain!r} are running in {top}")

    @classmethod
    def _take(cls, name: str, top: Path, above: int) -> RunDirectory | None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)
        fd = os.open(name, _DIRECTORY, dir_fd=above)
        if not _try_lock(fd):
            os.close(fd)
            return None
        directory = cls(name, top / name, fd)
        try:
            if os.fstat(fd).st_nlink == 0:
                # Its VM has just ended and removed it.
                directory.close()
                return None
            _empty(fd)
            pid = os.open(_PID, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd)
            with os.fdopen(pid, "w") as file:
                file.write(f"{os.getpid()}\n")
        except OSError:
            directory.close()
            raise
        return directory

    def close(self) -> None:
        """Remove the directory and drop its lock; idempotent, never raises."""
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):
            _empty(self.fd)
            # Fails when the user put something into it, or removed it and another VM has the name.
            self.path.rmdir()
        os.close(self.fd)
        self.fd = -1


def base() -> Path:
    """The directory that holds one directory per running VM of this user."""
    given = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    # With sudo the variable may still name the directory of somebody else.
    if given.is_absolute() and _belongs_to_us(given):
        return given / "qvm"
    return Path("/run/qvm") if os.geteuid() == 0 else Path(f"/tmp/qvm-{os.geteuid()}")


def running() -> list[RunningVm]:
    """The running VMs of this user by name; removes what dead ones left. Raises HostError."""
    top = base()
    if not top.is_dir():
        return []
    found = []
    with _locked(top, create=False) as above:
        for name in sorted(os.listdir(above)):
            try:
                fd = os.open(name, _DIRECTORY, dir_fd=above)
            except OSError:
                continue  # not a run directory
            try:
                if not _try_lock(fd):
                    found.append(RunningVm(name, _pid(fd), top / name))
                else:
                    with contextlib.suppress(OSError):
                        _empty(fd)
                        os.rmdir(name, dir_fd=above)
            finally:
                os.close(fd)
    return found


@contextlib.contextmanager
def _locked(top: Path, *, create: bool) -> Iterator[int]:
    """The directory above all run directories, locked; its descriptor."""
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                top.mkdir(mode=0o700)
        fd = os.open(top, _DIRECTORY)
    except OSError as error:
        raise HostError.from_os("use the run directory", top, error) from error
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid():
            raise HostError(
                f"the run directory {top} belongs to another user (uid {info.st_uid})",
                hint="set XDG_RUNTIME_DIR to a directory of your own",
            )
        if info.st_mode & 0o077:
            raise HostError(f"the run directory {top} is open to other users", hint=f"chmod 700 {top}")
        deadline = time.monotonic() + LOCK_PATIENCE
        while not _try_lock(fd):
            if time.monotonic() >= deadline:
                raise HostError(f"the run directory {top} stays locked by another process")
            time.sleep(0.01)
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _empty(fd: int) -> None:
    for name in (SOCKET, _PID):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=fd)


def _pid(fd: int) -> int:
    try:
        with os.fdopen(os.open(_PID, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd), "rb") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return 0


def _belongs_to_us(path: Path) -> bool:
    try:
        info = path.stat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
