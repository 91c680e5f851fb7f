"""A listening Unix socket as a serial line: one client at a time, who may come and go."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from qvm_chardev.channel import Channel, hung_up
from qvm_chardev.client import ClientLine
from qvm_chardev.device import Wiring
from qvm_chardev.spec import UNIX_PATH_MAX
from qvmcore.api import HostError


class UnixSocket(ClientLine):
    """Listens on ``path`` (mode 0600); unlinks it at the end if it is still the one made here.

    Without a client output is dropped and counted. A second client is told that the line is taken.
    """

    def __init__(self, path: Path, wiring: Wiring) -> None:
        super().__init__(wiring)
        self.description = f"unix:{path}"
        self._path = path
        self._client_fd = -1
        self._half_closed = False
        self._listener = _listen(path, wiring.name)
        status = path.stat(follow_symlinks=False)
        self._identity = (status.st_dev, status.st_ino)
        wiring.worker.watch(self._listener.fileno(), self._accept)
        wiring.log.info("%s: connect with: socat -,rawer,escape=0x1d unix-connect:%s", wiring.name, path)

    def close(self) -> None:
        """See CharDevice."""
        self._drop_client()
        if self._listener.fileno() < 0:
            return
        self._wiring.worker.unwatch(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            status = self._path.stat(follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._identity:
                self._path.unlink()

    def _accept(self) -> None:
        try:
            new, _ = self._listener.accept()
        except OSError:
            # The client went away again before it was accepted.
            return
        with new:
            new.setblocking(False)
            if self._client is not None and (self._half_closed or hung_up(self._client_fd)):
                self._drop_client()
            if self._client is not None:
                with contextlib.suppress(OSError):
                    new.send(f"{self._wiring.name} is in use by another client\r\n".encode())
                return
            fd = os.dup(new.fileno())
        self._client_fd, self._half_closed = fd, False
        self._attach(fd, self._client_lost)
        self._wiring.log.debug("%s: client connected", self._wiring.name)
        self._wiring.on_connection(True)

    def _client_lost(self, client: Channel, error: OSError | None) -> None:
        if client is not self._client:
            return
        if error is None and not hung_up(self._client_fd):
            # It only closed its sending side (`echo ls | nc -U ...`) and still wants the answer.
            self._half_closed = True
            return
        self._drop_client()

    def _drop_client(self) -> None:
        if self._detach():
            # What was held back for this client may go: it is dropped until the next one comes.
            self._wiring.worker.call(self._client_gone)

    def _client_gone(self) -> None:
        if self._client is None:
            self._wiring.on_connection(False)
        self._wiring.on_writable()


def _listen(path: Path, name: str) -> socket.socket:
    if len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise HostError(f"{name}: the socket path {path} is longer than {UNIX_PATH_MAX} bytes")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode of the node that bind makes; whoever may connect has the guest's console.
        os.fchmod(listener.fileno(), 0o600)
        try:
            listener.bind(str(path))
        except OSError:
            _remove_stale(path, name)
            listener.bind(str(path))
        listener.listen(4)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise HostError.from_os("listen on", path, error) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path, name: str) -> None:
    """Remove the socket of a process that is gone. Raises HostError for anything else."""
    try:
        mode = path.stat(follow_symlinks=False).st_mode
    except OSError:
        # Nothing is there: bind failed for another reason, and says so the second time.
        return
    if not stat.S_ISSOCK(mode):
        raise HostError(f"{name}: {path} exists and is no socket", hint="choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            # Alive but busy, or not ours to ask: not stale.
            pass
    raise HostError(f"{name}: another process listens on {path}")
