"""A pseudo-terminal as a serial line: people attach to it with screen, picocom and the like."""

from __future__ import annotations

import contextlib
import os
import stat
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvm_chardev.channel import Channel, hung_up
from qvm_chardev.device import Wiring
from qvm_chardev.rawmode import raw_modes
from qvmcore.api import HostError

#: Seconds between looks for somebody who opens an unused pseudo-terminal: nothing reports that.
PROBE_SECONDS = 0.5


class Pty:
    """Opens a pseudo-terminal; logs its path and keeps ``link``, if given, pointing to it.

    While nobody has the other side open, output is dropped and counted.
    """

    def __init__(self, link: Path | None, wiring: Wiring) -> None:
        self._wiring = wiring
        self._link = link
        self._client: Channel | None = None
        self._paused = self._closed = False
        self._ignored = self._sent = self._received = 0
        try:
            self._master, other = os.openpty()
        except OSError as error:
            raise HostError.from_os("open", "a pseudo-terminal", error) from error
        os.set_blocking(self._master, False)
        self.path = os.ttyname(other)
        self.description = f"pty {self.path}"
        termios.tcsetattr(other, termios.TCSANOW, raw_modes(termios.tcgetattr(other)))
        # Closed once, the other side reports "hung up" until somebody opens it.
        os.close(other)
        try:
            self._make_link()
        except HostError:
            os.close(self._master)
            raise
        wiring.log.info("%s: pseudo-terminal %s%s", wiring.name, self.path, f" ({link})" if link else "")
        wiring.worker.call_later(PROBE_SECONDS, self._probe)

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

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if self._client is not None:
            self._client.pause_input(paused)

    def size(self) -> tuple[int, int] | None:
        """The terminal behind a pseudo-terminal is not known."""
        return None

    def flush(self, timeout: float) -> bool:
        """See CharDevice."""
        client = self._client
        return client is None or client.flush(timeout)

    def close(self) -> None:
        """See CharDevice."""
        if self._closed:
            return
        self._closed = True
        self._drop_client()
        os.close(self._master)
        if self._link is not None:
            with contextlib.suppress(OSError):
                if str(self._link.readlink()) == self.path:
                    self._link.unlink()

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

    def _make_link(self) -> None:
        if self._link is None:
            return
        try:
            if stat.S_ISLNK(self._link.stat(follow_symlinks=False).st_mode):
                # Of an earlier run that was killed: it is a link, nothing is lost with it.
                self._link.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise HostError.from_os("replace", self._link, error) from error
        try:
            self._link.symlink_to(self.path)
        except OSError as error:
            raise HostError.from_os("make the link", self._link, error) from error

    def _probe(self) -> None:
        if self._closed or self._client is not None:
            return
        if hung_up(self._master):
            self._wiring.worker.call_later(PROBE_SECONDS, self._probe)
            return
        client = Channel(
            os.dup(self._master),
            worker=self._wiring.worker,
            on_space=self._wiring.on_writable,
            on_lost=lambda _error: self._client_lost(client),
            on_input=self._wiring.on_input,
            stall=self._wiring.stall,
        )
        client.pause_input(self._paused)
        self._client = client
        self._wiring.on_connection(True)

    def _client_lost(self, client: Channel) -> None:
        if client is self._client and not self._closed:
            self._drop_client()
            self._wiring.on_connection(False)
            self._wiring.on_writable()
            self._wiring.worker.call_later(PROBE_SECONDS, self._probe)

    def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
            self._sent += client.sent
            self._received += client.received
            self._ignored += client.dropped
