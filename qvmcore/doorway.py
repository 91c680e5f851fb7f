"""A Unix socket for the clients of one vdev (floor 8), in a directory of the user's choice."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path

from qvmcore.errors import HostError

#: Bytes of a Unix socket's path, without the final NUL.
PATH_LIMIT = 107
_BACKLOG = 128
#: Seconds to wait when the process has no descriptor left for a client.
_PAUSE = 0.1


class Doorway:
    """Listens at ``folder/NAME.sock``; makes the folder if only that is missing.

    What a dead server left at the path is replaced; a living one's is not. Raises HostError.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder.absolute() / f"{name}.sock"
        length = len(os.fsencode(self.path))
        if length > PATH_LIMIT:
            raise HostError(
                f"{self.path}: {length} bytes are too long for the path of a socket",
                hint=f"take a directory with a shorter path ({PATH_LIMIT} bytes in all)",
            )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _make(folder)
            self._bind()
            self._inode = self.path.stat().st_ino
            self._listener.listen(_BACKLOG)
            self._listener.setblocking(False)
        except HostError:
            self._listener.close()
            raise
        except OSError as error:
            self._listener.close()
            raise HostError.from_os("make the socket", self.path, error) from error

    def fileno(self) -> int:
        """The listening socket."""
        return self._listener.fileno()

    def accept(self) -> socket.socket | None:
        """The next client, None when there is none (any more)."""
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(_PAUSE)
            return None
        return client

    def close(self) -> None:
        """Stop listening and remove the socket, unless somebody else has put his there; idempotent."""
        if self._listener.fileno() < 0:
            return
        self._listener.close()
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _bind(self) -> None:
        try:
            self._listener.bind(str(self.path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            self._remove_stale()
            self._listener.bind(str(self.path))

    def _remove_stale(self) -> None:
        if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
            raise HostError(
                f"{self.path} exists and is no socket", hint="remove it, or take another directory"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
            except BlockingIOError:
                pass  # its backlog is full: it lives
        raise HostError(f"{self.path} is served by another process", hint="end it, or take another directory")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise HostError(f"{folder} is no directory") from None
    except OSError as error:
        raise HostError.from_os("make the directory", folder, error) from error
