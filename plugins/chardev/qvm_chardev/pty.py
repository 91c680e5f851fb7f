"""A pseudo-terminal as a serial line: people attach to it with screen, picocom and the like."""

from __future__ import annotations

import contextlib
import os
import stat
import termios
from pathlib import Path

from qvm_chardev.channel import Channel, hung_up
from qvm_chardev.client import ClientLine
from qvm_chardev.device import Wiring
from qvm_chardev.rawmode import raw_modes
from qvmcore.api import HostError

#: Seconds between looks for somebody who opens an unused pseudo-terminal: nothing reports that.
PROBE_SECONDS = 0.5


class Pty(ClientLine):
    """Opens a pseudo-terminal; logs its path and keeps ``link``, if given, pointing to it.

    While nobody has the other side open, output is dropped and counted.
    """

    def __init__(self, link: Path | None, wiring: Wiring) -> None:
        super().__init__(wiring)
        self._link = link
        self._closed = False
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

    def close(self) -> None:
        """See CharDevice."""
        if self._closed:
            return
        self._closed = True
        self._detach()
        os.close(self._master)
        if self._link is not None:
            with contextlib.suppress(OSError):
                if str(self._link.readlink()) == self.path:
                    self._link.unlink()

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
        self._attach(os.dup(self._master), self._client_lost)
        self._wiring.on_connection(True)

    def _client_lost(self, client: Channel, _error: OSError | None) -> None:
        if client is self._client and not self._closed:
            self._detach()
            self._wiring.on_connection(False)
            self._wiring.on_writable()
            self._wiring.worker.call_later(PROBE_SECONDS, self._probe)
