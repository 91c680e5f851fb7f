"""The channel for requests of ours to the client (BACKEND_REQ): a socket we never wait for."""

from __future__ import annotations

import logging
import socket
import threading

from qvm_vhost_user.notifier import is_unix_stream
from qvm_vhost_user.protocol import HEADER, VERSION, BackendRequest
from qvm_vhost_user.wire import Fd
from qvmcore.api import ClientError

_CONFIG_CHANGE = HEADER.pack(BackendRequest.CONFIG_CHANGE, VERSION, 0)


class BackendChannel:
    """Tells the client of configuration changes. Any thread; never blocks.

    No answer is asked for, so nothing has to be read. While the client does not read, messages are
    dropped: it has one to read already, and asks for the whole configuration then.
    """

    def __init__(self, log: logging.LoggerAdapter[logging.Logger]) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._dropping = False

    def set(self, fd: Fd) -> None:
        """Use this socket from now on. Raises ClientError when it is none."""
        if not is_unix_stream(fd.number):
            raise ClientError("SET_BACKEND_REQ_FD came with a descriptor that is no Unix stream socket")
        channel = socket.socket(fileno=fd.take())
        with self._lock:
            old, self._socket = self._socket, channel
            self._dropping = False
        if old is not None:
            old.close()

    def config_changed(self) -> None:
        """Send CONFIG_CHANGE, if there is a channel and the client reads."""
        with self._lock:
            if self._socket is None:
                return
            try:
                sent = self._socket.send(_CONFIG_CHANGE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._dropping:
                    self._dropping = True
                    self._log.warning("the client does not read; it is not told of configuration changes")
                return
            except OSError:
                sent = 0
            self._dropping = False
            if sent != len(_CONFIG_CHANGE):
                # The client has closed its end, or only a part went: what follows would make no sense.
                self._socket.close()
                self._socket = None

    def close(self) -> None:
        """Send nothing any more; idempotent."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
