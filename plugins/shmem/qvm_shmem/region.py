"""Regions on the host: files that the processes of several VMs map.

For a region ``n`` there are, in a directory that belongs to one user:

``n.data``      a page of notes (who has told whom), then the shared memory
``n.held``      every process that has the region holds a shared ``flock`` on it
``n.0`` ... 15  a FIFO per client: a byte in it wakes the client, and a client that is gone has
                no reader there any more

The kernel drops locks and readers with their process, ``kill -9`` included, so what is left behind is
recognised and replaced. ``.lock`` serialises attaching and detaching; nothing else waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from qvm_shmem.spec import EVERYONE, MAX_CLIENTS, PAGE, Refused, Status
from qvmcore.api import HostError

#: Seconds to wait for another process that attaches or detaches; a vCPU may be waiting.
LOCK_SECONDS = 0.5
_SUFFIXES = ("data", *map(str, range(MAX_CLIENTS)))


class Store:
    """The directory of the regions. Makes it, for this user alone, and removes what dead VMs left."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            found = directory.stat(follow_symlinks=False)
        except OSError as error:
            raise HostError.from_os("make", directory, error, hint="give another 'directory'") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise HostError(
                f"{directory} is not a directory that only this user can write to",
                hint="give another 'directory'",
            )
        try:
            with self._locked():
                for held in directory.glob("*.held"):
                    self._sweep(held)
        except Refused as refused:
            # Somebody is busy with it: what is stale stays until the next start.
            if isinstance(refused.__cause__, OSError):
                raise HostError.from_os("use", directory, refused.__cause__) from refused

    def attach(self, name: str, pages: int | None) -> Region:
        """The region, created with ``pages`` when there is none; None only finds. Raises Refused."""
        # A leading dot would be this directory, its parent, or a hidden file.
        leading = len(name) - len(name.lstrip("."))
        path = self._directory / ("%2E" * leading + quote(name[leading:], safe=""))
        try:
            with self._locked():
                held = os.open(f"{path}.held", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                try:
                    if _try_lock(held, fcntl.LOCK_EX):
                        self._create(path, pages)
                    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return Region(self, path, held)
                except BaseException:
                    os.close(held)
                    raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG, errno.EMFILE)
            raise Refused(Status.NO_MEMORY if full else Status.UNKNOWN_FAILURE) from error

    def _create(self, path: Path, pages: int | None) -> None:
        """A new region, with nobody in it (locks held). What a dead VM left is removed."""
        _remove(path)
        if pages is None:
            Path(f"{path}.held").unlink()
            raise Refused(Status.DOES_NOT_EXIST)
        data = os.open(f"{path}.data", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # Memory that is not there when it is needed would be a SIGBUS.
            os.posix_fallocate(data, 0, (1 + pages) * PAGE)
        except OSError:
            _remove(path)
            Path(f"{path}.held").unlink()
            raise
        finally:
            os.close(data)

    def release(self, path: Path, held: int) -> None:
        """Let go of a region; the last one removes it."""
        try:
            with contextlib.suppress(Refused), self._locked():
                if _try_lock(held, fcntl.LOCK_EX):
                    _remove(path)
                    Path(f"{path}.held").unlink(missing_ok=True)
        finally:
            os.close(held)

    def _sweep(self, held: Path) -> None:
        fd = os.open(held, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _try_lock(fd, fcntl.LOCK_EX):
                _remove(held.with_suffix(""))
                held.unlink()
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes that attach and detach. Raises Refused after LOCK_SECONDS."""
        with self._locked():
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            fd = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise Refused(Status.UNKNOWN_FAILURE) from error
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _try_lock(fd, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise Refused(Status.UNKNOWN_FAILURE)
                time.sleep(0.001)
            yield
        finally:
            os.close(fd)


class Region:
    """A region this process has mapped. ``pages`` of 4 KiB; not thread-safe."""

    def __init__(self, store: Store, path: Path, held: int) -> None:
        self._store = store
        self._path = path
        self._held = held
        data = os.open(f"{path}.data", os.O_RDWR | os.O_NOFOLLOW)
        try:
            self._map = mmap.mmap(data, 0)
        finally:
            os.close(data)
        self.pages = len(self._map) // PAGE - 1
        whole = memoryview(self._map)
        #: notes[16 * to + from] is 1 while client ``to`` has not yet seen what ``from`` told it. Each
        #: byte is set by one process and cleared by one other, so no set is ever lost.
        self._notes = whole[: MAX_CLIENTS * MAX_CLIENTS]
        memory = whole[PAGE:]
        whole.release()
        # One view per access size: an aligned access is one load or store for the other VMs, too.
        self._views: dict[int, memoryview[int]] = {
            1: memory,
            2: memory.cast("H"),
            4: memory.cast("I"),
            8: memory.cast("Q"),
        }
        self._fifo = -1
        self.index = -1

    # ---- clients -------------------------------------------------------------------------------

    def join(self) -> int:
        """Become a client; the descriptor that is readable when another client notifies. Raises Refused."""
        with self._store.locked():
            index = next((index for index in range(MAX_CLIENTS) if not self._alive(index)), None)
            if index is None:
                raise Refused(Status.CLIENT_MAX)
            path = f"{self._path}.{index}"
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)  # noqa: PTH108 - the neighbours are descriptors, too
                os.mkfifo(path, 0o600)
                # With the writing side open as well there is never an end of file.
                self._fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            except OSError as error:
                raise Refused(Status.UNKNOWN_FAILURE) from error
            self.index = index
            self._forget()
        return self._fifo

    @property
    def active(self) -> int:
        """The clients there are, one bit each."""
        return sum(1 << index for index in range(MAX_CLIENTS) if self._alive(index))

    def notify(self, clients: int) -> int:
        """Notify a set of clients, EVERYONE but this one, or some; how many there were."""
        if clients == EVERYONE:
            clients &= ~(1 << self.index)
        told = 0
        for index in range(MAX_CLIENTS):
            if clients >> index & 1:
                self._notes[MAX_CLIENTS * index + self.index] = 1
                told += self._wake(index)
        return told

    def collect(self) -> int:
        """The clients that have notified this one since the last call, one bit each."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._fifo, PAGE)) == PAGE:
                pass
        bits, start = 0, MAX_CLIENTS * self.index
        for sender in range(MAX_CLIENTS):
            if self._notes[start + sender]:
                self._notes[start + sender] = 0
                bits |= 1 << sender
        return bits

    def _alive(self, index: int) -> bool:
        fd = self._open(index)
        if fd < 0:
            return False
        os.close(fd)
        return True

    def _wake(self, index: int) -> bool:
        fd = self._open(index)
        if fd < 0:
            return False
        try:
            os.write(fd, b"\0")
        except BlockingIOError:
            # Full of wake-ups that were not taken yet: one more would say nothing new.
            pass
        finally:
            os.close(fd)
        return True

    def _open(self, index: int) -> int:
        try:
            return os.open(f"{self._path}.{index}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            # No such client (ENOENT), or nobody reads because it is gone (ENXIO).
            return -1

    def _forget(self) -> None:
        """Nobody has told this client anything, nor it anybody."""
        for other in range(MAX_CLIENTS):
            self._notes[MAX_CLIENTS * self.index + other] = 0
            self._notes[MAX_CLIENTS * other + self.index] = 0

    # ---- memory --------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """``size`` bytes at ``offset``, little-endian. IndexError outside."""
        if offset % size == 0:
            return self._views[size][offset // size]
        if offset + size > len(self._views[1]):
            raise IndexError(offset)
        return int.from_bytes(self._views[1][offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """As :meth:`read`."""
        if offset % size == 0:
            self._views[size][offset // size] = value
        elif offset + size > len(self._views[1]):
            raise IndexError(offset)
        else:
            self._views[1][offset : offset + size] = value.to_bytes(size, "little")

    def close(self) -> None:
        """Leave, unmap and let go; idempotent."""
        if self._held < 0:
            return
        if self._fifo >= 0:
            with contextlib.suppress(OSError, Refused), self._store.locked():
                self._forget()
                os.unlink(f"{self._path}.{self.index}")  # noqa: PTH108
            os.close(self._fifo)
            self._fifo = -1
        for view in (self._notes, *reversed(self._views.values())):
            view.release()
        self._map.close()
        held, self._held = self._held, -1
        self._store.release(self._path, held)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    for suffix in _SUFFIXES:
        Path(f"{path}.{suffix}").unlink(missing_ok=True)
