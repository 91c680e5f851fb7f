"""The connection to an NBD server: made, watched, lost and made again. Knows no requests.

All of it runs on the disk's worker, except :meth:`Link.connect_now`, before the guest starts, and
:meth:`Link.step_blocking` and :meth:`Link.close`, after the worker has ended.
"""

from __future__ import annotations

import logging
import select
import time
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from qvm_virtio_blk.libnbd import READ, WRITE, Connection
from qvmcore.api import HostError, Worker

#: Seconds from one attempt to connect to the next.
RETRY = 0.5
#: Seconds an attempt may take.
CONNECT_TIMEOUT = 5.0


class Owner(Protocol):
    """Who uses a link."""

    def check_export(self, connection: Connection) -> None:
        """Look at a described export; HostError refuses it."""

    def link_up(self, connection: Connection) -> None:
        """Commands may be given from here on."""

    def link_moved(self, connection: Connection) -> None:
        """Commands may have come back."""

    def link_down(self) -> None:
        """No command comes back any more; ``connection`` is None from here on."""

    def link_settled(self) -> None:
        """The end of every turn of the link."""


class Link:
    """The connection to ``uri``, for ``owner``. ``connection`` is None unless commands may be given.

    Once it was up, :meth:`tick` makes it again every RETRY seconds for ever; before, an attempt is
    the caller's.
    """

    def __init__(
        self, uri: str, owner: Owner, worker: Worker, log: logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self.uri = uri
        self.connection: Connection | None = None
        #: Whether it was up at any time.
        self.known = False
        self._owner = owner
        self._worker = worker
        self._log = log
        #: Up or being made.
        self._current: Connection | None = None
        self._watched = -1
        self._attempt_at = 0.0
        self._failure: HostError | None = None
        #: What was wrong with the export, told once.
        self._refused = ""

    @property
    def busy(self) -> bool:
        """Whether :meth:`tick` has to be called from time to time."""
        return self.connection is None and (self.known or self._current is not None)

    def connect_now(self) -> None:
        """Connect, waiting at most CONNECT_TIMEOUT seconds. Raises HostError."""
        self._begin()
        deadline = self._attempt_at + CONNECT_TIMEOUT
        while self._failure is None and self.connection is None:
            self.step_blocking(deadline)
        if self._failure is not None:
            raise self._failure
        self.watch()

    def attempt(self) -> bool:
        """Connect without waiting: True when connected, False while connecting. Raises HostError."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._current is None:
            self._begin()
            self.watch()
        else:
            self.tick(time.monotonic())
        return self.connection is not None

    def tick(self, now: float) -> None:
        """Time passes: give an attempt up, or begin the next one."""
        if self._current is not None and self.connection is None:
            if now >= self._attempt_at + CONNECT_TIMEOUT:
                self.lost(TimeoutError("the server does not answer"))
        elif self.known and self._current is None and now >= self._attempt_at + RETRY:
            self._begin()
            self.watch()

    def lost(self, error: OSError) -> None:
        """The connection is of no use any more."""
        if self.connection is not None:
            self._log.warning("lost the connection to %s: %s", self.uri, error.strerror or error)
        self.close()
        self._failure = HostError(
            f"cannot connect to {self.uri}: {error.strerror or error}",
            hint="is the server running and the export's name right? nbdinfo URI tells",
        )

    def close(self) -> None:
        """Let go of the connection; idempotent."""
        current, self._current = self._current, None
        up, self.connection = self.connection, None
        if self._watched >= 0:
            self._worker.unwatch(self._watched)
            self._watched = -1
        if current is not None:
            current.close()
        if up is not None:
            self._owner.link_down()

    def watch(self) -> None:
        """Watch the socket for what libnbd waits for; to be called after commands were given."""
        current = self._current
        if current is None:
            return
        try:
            fd, direction = current.fileno(), current.direction
        except OSError as error:
            self.lost(error)
            return
        # libnbd tries one address after the other: another socket may have got the same number.
        if self._watched >= 0 and (self._watched != fd or self.connection is None):
            self._worker.unwatch(self._watched)
        self._watched = fd
        self._worker.watch(
            fd,
            (lambda: self.step(readable=True)) if direction & READ else None,
            (lambda: self.step(writable=True)) if direction & WRITE else None,
        )

    def step(self, *, readable: bool = False, writable: bool = False) -> None:
        """Let libnbd go on, then tell the owner, and watch again."""
        self._advance(readable, writable)
        self.watch()
        self._owner.link_settled()

    def step_blocking(self, deadline: float) -> None:
        """A step without the worker: wait for the socket, until ``deadline`` in monotonic seconds."""
        current = self._current
        if current is None:
            return
        try:
            fd, direction = current.fileno(), current.direction
        except OSError as error:
            self.lost(error)
            return
        wanted = (select.POLLIN if direction & READ else 0) | (select.POLLOUT if direction & WRITE else 0)
        poll = select.poll()
        poll.register(fd, wanted)
        events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not events:
            self.lost(TimeoutError("the server does not answer"))
            return
        ended = events[0][1] & (select.POLLHUP | select.POLLERR)
        readable, writable = (bool(events[0][1] & flag or ended) for flag in (select.POLLIN, select.POLLOUT))
        self._advance(readable, writable)

    def _begin(self) -> None:
        """Start an attempt. What fails is kept in ``_failure``."""
        self._attempt_at = time.monotonic()
        self._failure = None
        try:
            self._current = Connection(self.uri)
        except OSError as error:
            self.lost(error)
        except HostError as error:
            self._failure = error

    def _advance(self, readable: bool, writable: bool) -> None:
        current = self._current
        if current is None:
            return
        try:
            # One reply a time: libnbd woken without data stays in its reply state and sends nothing.
            current.notify(readable, writable)
            if current.ready and self.connection is None:
                self._greeted(current)
            if self.connection is not None:
                self._owner.link_moved(self.connection)
            if current.dead:
                raise ConnectionError("the server closed the connection")
        except OSError as error:
            if self._current is current:
                self.lost(error)

    def _greeted(self, current: Connection) -> None:
        """The handshake is over: look at the export. Raises OSError."""
        current.describe()
        try:
            self._owner.check_export(current)
        except HostError as error:
            self.close()
            self._failure = error
            if self.known and str(error) != self._refused:
                self._refused = str(error)
                self._log.error("%s", error)
            return
        if self.known:
            self._log.info("connected to %s again", self.uri)
        self.known = True
        self._refused = ""
        self.connection = current
        self._owner.link_up(current)


def locate(uri: str, base: Path) -> str:
    """The URI with a relative path of its socket starting at ``base``."""
    parts = urlsplit(uri)
    query = parse_qsl(parts.query)
    if not any(key == "socket" for key, _ in query):
        return uri
    query = [(key, str((base / value).absolute()) if key == "socket" else value) for key, value in query]
    # By hand: urlunsplit drops the empty host of nbd+unix:///, for it does not know the scheme.
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{urlencode(query, safe='/', quote_via=quote)}"
