"""One served vdev at its socket (floor 8): its clients, one after the other, and its lives.

Threads: the acceptor takes clients from all sockets and hands them over; each post has a thread that serves
them, and on which the vdev's life begins and ends. What one client or one vdev does wrong ends one
connection, never the process.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qvmcore.bind import DefaultBindings
from qvmcore.doorway import Doorway
from qvmcore.errors import ClientError, for_people
from qvmcore.events import EventFd, stack_of
from qvmcore.plugins import PluginHost
from qvmcore.served import ServedLife, begin_life
from qvmcore.server import Server
from qvmcore.types import GuestEnd, MachineSpec, Reason, VdevSpec

log = logging.getLogger("qvm")

#: Seconds a session may take to return once its socket is shut down.
SESSION_PATIENCE = 7.0
#: Seconds the acceptor's thread gets to end.
ACCEPTOR_PATIENCE = 1.0
#: Clients that may have come and gone while the one before them is being ended.
WAITING_LIMIT = 64


class Post:
    """One vdev at its socket: takes the clients that the acceptor hands over, on a thread of its own."""

    def __init__(
        self,
        spec: MachineSpec,
        vdev: VdevSpec,
        host: PluginHost,
        bindings: DefaultBindings,
        server: Server,
        folder: Path,
        poll: float,
    ) -> None:
        self.vdev = vdev
        self._server = server
        self._born: Callable[[], ServedLife | None] = lambda: begin_life(
            spec, vdev, host, bindings, server, self._asked, poll
        )
        # The first life has to succeed: what is wrong with the file is said now, not to a client.
        self.life: ServedLife | None = ServedLife(spec, vdev, host, bindings, server, self._asked, poll)
        try:
            self.doorway = Doorway(folder, vdev.name)
        except BaseException:
            self.life.end(GuestEnd(Reason.HOST_ERROR, "no socket"))
            raise
        self._clients: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self._current: socket.socket | None = None
        self._waiting: list[socket.socket] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._quiet = True
        self._thread = threading.Thread(target=self._run, name=f"serve-{vdev.name}", daemon=True)

    def start(self) -> None:
        """Serve clients from now on."""
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether there is a client. Any thread."""
        return self._current is not None

    def attach_lines(self) -> Sequence[tuple[str, str]]:
        """The server's advice."""
        return [] if self.life is None else self._server.attach_lines(self.life.vdev, self.doorway.path)

    def offer(self, client: socket.socket) -> None:
        """A client has connected: it is the next one if everybody before it has gone."""
        with self._lock:
            busy = len(self._waiting) >= WAITING_LIMIT or not all(map(_gone, self._waiting))
            if not busy:
                self._waiting.append(client)
        if busy:
            log.warning("%s: a second client was turned away; one is connected already", self.vdev.name)
            client.close()
        else:
            self._clients.put(client)

    def ask_to_end(self) -> None:
        """No more clients; the one that is there is shut out."""
        self._stopping = True
        self._clients.put(None)
        self._shut_out()

    def end(self, deadline: float) -> bool:
        """Wait until the vdev's life is over, or end it here; whether it was proven quiet."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, min(SESSION_PATIENCE, deadline - time.monotonic())))
            if self._thread.is_alive() and self._current is not None:
                stack = stack_of(self._thread.ident)
                log.error("%s: its session does not end; it is at\n%s", self.vdev.name, stack)
            else:
                self._thread.join(max(0.0, deadline - time.monotonic()))
        self.doorway.close()
        life = self.life
        # Twice does no harm: the plan runs once.
        return (life is None or life.end(GuestEnd(Reason.POWER_CUT, "qvm serve ends"))) and self._quiet

    def _run(self) -> None:
        while not self._stopping:
            client = self._clients.get()
            if client is None or self._stopping:
                break
            self._current = client
            try:
                self._serve(client)
            finally:
                self._current = None
                with self._lock:
                    self._waiting.remove(client)
                client.close()
        for client in self._waiting:
            client.close()
        if self.life is not None:
            self._quiet &= self.life.end(GuestEnd(Reason.POWER_CUT, "qvm serve ends"))

    def _serve(self, client: socket.socket) -> None:
        name = self.vdev.name
        if self.life is not None and self.life.slot.faulted:
            self._end_life()
        if self.life is None and self._quiet:
            self.life = self._born()
        life = self.life
        if life is None:
            log.warning("%s: a client was turned away: the vdev cannot be had", name)
            return
        log.info("%s: client connected", name)
        try:
            life.session.serve(client)
            log.info("%s: client disconnected", name)
        except ClientError as error:
            log.warning("%s: connection closed: %s", name, error)
        except OSError as error:
            if text := for_people(error):
                log.warning("%s: connection closed: %s", name, text)
            else:
                log.info("%s: client disconnected: %s", name, error.strerror or error)
        except Exception:
            log.exception("%s: connection closed: the server failed", name)
        if life.used and not self._stopping:
            self._end_life()

    def _end_life(self) -> None:
        """The client's memory is given back here at the latest: its guest may be gone.

        The next life begins with the next client: until then nothing of the host is held, as between
        two runs of a VM.
        """
        life, self.life = self.life, None
        if life is not None and not life.end(GuestEnd(Reason.GUEST_SHUTDOWN, "the client has gone")):
            self._quiet = False
            log.error("%s: was not proven quiet; it is not served any more", self.vdev.name)

    def _asked(self, end: GuestEnd) -> None:
        log.info("%s: the vdev asked for an end (%s); its client is shut out", self.vdev.name, end.message)
        self._shut_out()

    def _shut_out(self) -> None:
        client = self._current
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


class Acceptor:
    """The thread that takes clients from all sockets and hands them over; it never waits for one."""

    def __init__(self) -> None:
        self._wake = EventFd()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self, posts: Sequence[Post]) -> None:
        """Take clients for these posts from now on."""
        self._thread = threading.Thread(target=self._run, args=(posts,), name="accept", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more; waits for the thread, bounded."""
        self._stopping = True
        self._wake.signal()
        if self._thread is not None:
            self._thread.join(ACCEPTOR_PATIENCE)
        self._wake.close()

    def _run(self, posts: Sequence[Post]) -> None:
        by_fd = {post.doorway.fileno(): post for post in posts}
        poll = select.poll()
        poll.register(self._wake.fd, select.POLLIN)
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while not self._stopping:
            for fd, _ in poll.poll():
                if fd in by_fd and not self._stopping:
                    client = by_fd[fd].doorway.accept()
                    if client is not None:
                        by_fd[fd].offer(client)


def _gone(client: socket.socket) -> bool:
    """Whether the other side has closed its connection."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))
