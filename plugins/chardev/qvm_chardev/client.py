"""A line somebody attaches to and leaves again: what a pseudo-terminal and a listening socket share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from qvm_chardev.channel import Channel
from qvm_chardev.device import Wiring


class ClientLine:
    """At most one client, behind a :class:`~qvm_chardev.channel.Channel`. Implements CharDevice.

    Without a client output is dropped and counted. A subclass sets ``description``, finds clients
    and says how to close the line; it attaches and detaches on the worker, or once that has stopped.
    """

    description: str

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._client: Channel | None = None
        # A client must not slip in between pause_input() of another thread and its effect.
        self._lock = threading.Lock()
        self._paused = False
        self._ignored = self._sent = self._received = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """See CharDevice."""
        client = self._client
        if client is None:
            self._ignored += len(data)
            return len(data)
        return client.write(data)

    def pause_input(self) -> None:
        """See CharDevice."""
        self._pause(True)

    def resume_input(self) -> None:
        """See CharDevice."""
        self._pause(False)

    def size(self) -> tuple[int, int] | None:
        """What is behind such a line has no size that we could know."""
        return None

    def flush(self, timeout: float) -> bool:
        """See CharDevice."""
        client = self._client
        return client is None or client.flush(timeout)

    def status(self) -> Mapping[str, Any]:
        """See CharDevice."""
        client = self._client
        return {
            "hostdev": self.description,
            "connected": client is not None,
            "received": self._received + (client.received if client else 0),
            "sent": self._sent + (client.sent if client else 0),
            "dropped": self._ignored + (client.dropped if client else 0),
        }

    def _attach(self, fd: int, on_lost: Callable[[Channel, OSError | None], None]) -> None:
        """Make ``fd``, which is ours from here on, the client; ``on_lost`` is told which one left."""
        client = Channel(
            fd,
            worker=self._wiring.worker,
            on_space=self._wiring.on_writable,
            on_lost=lambda error: on_lost(client, error),
            on_input=self._wiring.on_input,
            stall=self._wiring.stall,
        )
        with self._lock:
            self._client = client
            client.pause_input(self._paused)

    def _detach(self) -> bool:
        """Close the client and keep its counts; False when there is none."""
        with self._lock:
            client, self._client = self._client, None
            if client is None:
                return False
            client.close()
            self._sent += client.sent
            self._received += client.received
            self._ignored += client.dropped
            return True

    def _pause(self, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            if self._client is not None:
                self._client.pause_input(paused)
