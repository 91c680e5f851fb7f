"""Where the two ends of a peer link meet: one Unix socket whose path both VM files name.

Either VM may start first, and each may come back: an end connects if somebody listens, and listens
itself if nobody does. The right to listen is a lock on ``PATH.lock``, which dies with its process,
so a socket left behind by a killed VM is replaced and two ends never listen at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

from qvm_virtio_net.options import LINK_PATH_MAX
from qvmcore.api import HostError

#: What the kernel may hold of frames on their way, bytes, as far as net.core.wmem_max lets us.
_SOCKET_BUFFER = 4 << 20


def link_path(peer: str, base: Path) -> Path:
    """The socket of a link: a path as written, relative to ``base``; a name in the user's own folder.

    Raises HostError when the folder is missing, or is not safe to meet in.
    """
    path = base / Path(peer).expanduser() if "/" in peer else _own_folder() / f"{peer}.link"
    if len(os.fsencode(path)) > LINK_PATH_MAX:
        raise HostError(
            f"peer {peer!r}: the path {path} is longer than a socket may have ({LINK_PATH_MAX})",
            hint="use a name without '/', or a shorter path",
        )
    if not path.parent.is_dir():
        raise HostError(f"peer {peer!r}: there is no folder {path.parent}", hint="make it, or correct peer")
    return path


def _own_folder() -> Path:
    """A folder only this user can write to."""
    user = os.getuid()
    runtime = Path(f"/run/user/{user}")
    folder = runtime / "qvm" if runtime.is_dir() else Path(f"/tmp/qvm-{user}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise HostError.from_os("make the folder of peer links", folder, error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & 0o022:
        raise HostError(f"{folder} belongs to somebody else, or others may write to it", hint="remove it")
    return folder


def new_socket() -> socket.socket:
    """A non-blocking socket that keeps messages apart and in order."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    return made


def connect(path: Path) -> socket.socket | None:
    """A connection to whoever listens; None when nobody does. Raises OSError."""
    sock = new_socket()
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN):
            return None
        raise
    return sock


class Listener:
    """The right to listen at a path, and the socket that does."""

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError when another end is just about to listen, OSError otherwise."""
        self._path = path
        self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.socket = new_socket()
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._clear()
            # The mode of the descriptor becomes that of the file: nobody else can connect.
            os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(os.fspath(path))
            self.socket.listen(4)
        except BaseException:
            self.socket.close()
            os.close(self._lock)
            raise

    def _clear(self) -> None:
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise FileExistsError(errno.EEXIST, "it is no socket; remove it or correct the option peer")
        self._path.unlink()

    def accept(self) -> socket.socket | None:
        """The next connection, None when there is none."""
        try:
            sock, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        return sock

    def close(self) -> None:
        """Remove the socket, then give up the right. The lock file stays: it is what is locked."""
        try:
            self._path.unlink(missing_ok=True)
        finally:
            self.socket.close()
            os.close(self._lock)
