"""A man in the middle of vhost-user that takes features out of what a server offers.

Linux accepts whatever virtio_ring knows, and no parameter of it or of UML changes that: a driver uses
split rings only when packed ones are not offered. It also keeps what was said, for tests to look at.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

HEADER = struct.Struct("<III")
GET_FEATURES = 1
_MOST_FDS = 64


class Without:
    """Listens on ``path``, connects each client to ``server``; ``bits`` are not offered.

    ``messages`` are (request, payload) as the clients sent them.
    """

    def __init__(self, path: Path, server: Path, *bits: int) -> None:
        self.path = path
        self.messages: list[tuple[int, bytes]] = []
        self._server = server
        self._keep = ~sum(1 << bit for bit in bits)
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._spawn(self._accept)

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._open += [client, server]
                server.connect(str(self._server))
                self._spawn(self._forward, client, server, False)
                self._spawn(self._forward, server, client, True)

    def _forward(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        """Until either leaves; then both are left."""
        with contextlib.suppress(OSError):
            while (got := receive(source)) is not None:
                request, flags, payload, fds = got
                if replies and request == GET_FEATURES:
                    payload = struct.pack("<Q", struct.unpack("<Q", payload)[0] & self._keep)
                elif not replies:
                    self.messages.append((request, payload))
                try:
                    head = HEADER.pack(request, flags, len(payload))
                    socket.send_fds(sink, [head + payload], list(fds))
                finally:
                    for fd in fds:
                        os.close(fd)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it all."""
        for each in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for each in [self._listener, *self._open]:
            each.close()


def receive(source: socket.socket) -> tuple[int, int, bytes, array.array[int]] | None:
    """One message with its descriptors, or None at the end."""
    data, raw, _, _ = socket.recv_fds(source, HEADER.size, _MOST_FDS)
    fds = array.array("i", raw)
    while data and len(data) < HEADER.size:
        data += source.recv(HEADER.size - len(data))
    if not data:
        return None
    request, flags, size = HEADER.unpack(data)
    payload = b""
    while len(payload) < size and (chunk := source.recv(size - len(payload))):
        payload += chunk
    return request, flags, payload, fds
