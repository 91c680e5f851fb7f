"""What a client of the test kit holds besides its connection: a channel, and descriptors of rings."""

from __future__ import annotations

import os
import socket

from qvm_vhost_user.protocol import HEADER, NEED_REPLY, REPLY, U64, VERSION, BackendRequest


class BackendChannel:
    """Our end of the channel for requests of the server; ``config_changes`` counts those of that kind."""

    def __init__(self, channel: socket.socket) -> None:
        self.socket = channel
        self.config_changes = 0

    def poll(self, timeout: float = 0.0) -> int:
        """Take what came, waiting at most ``timeout`` seconds for the first; how many config changes yet."""
        self.socket.settimeout(timeout)
        try:
            while header := self.socket.recv(HEADER.size, socket.MSG_WAITALL if timeout else 0):
                request, flags, size = HEADER.unpack(header)
                assert flags & 7 == VERSION, f"a request of the server has flags {flags:#x}"
                assert size == 0, f"a configuration change has no payload, but {size} bytes came"
                assert request == BackendRequest.CONFIG_CHANGE, f"the server asks for {request}"
                self.config_changes += 1
                if flags & NEED_REPLY:
                    self.socket.sendall(HEADER.pack(request, VERSION | REPLY, U64.size) + U64.pack(0))
                self.socket.settimeout(0)
        except (TimeoutError, BlockingIOError):
            pass
        return self.config_changes

    def close(self) -> None:
        """Close our end."""
        self.socket.close()


class Vring:
    """One queue as the protocol sees it: where it is, and its three descriptors."""

    def __init__(self) -> None:
        self.size = 0
        self.places = (0, 0, 0)
        self.ready = False
        self.started = False
        self.kick, self.call, self.err = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.kick, self.call, self.err):
            os.close(fd)
