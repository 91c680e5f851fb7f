"""Hostdev ``peer``: a cable between two VMs.

Messages go over a SOCK_SEQPACKET Unix socket, one frame each with its struct virtio_net_hdr, so a
64 KiB segment of TCP crosses as one message and no checksum is ever computed. Nothing that comes is
believed: lengths and headers are checked by the receiver, the number of frames is bounded by the
socket's buffer, and an end that is silent, wrong or gone leaves the card with its cable out.
Worker thread.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qvm_virtio_net import link, spec
from qvm_virtio_net.hello import HELLO_BYTES_MAX, VERSION, Hello, decode, encode, refusal, warnings
from qvm_virtio_net.hostdev import Events, Interest, Sent
from qvmcore.api import Worker

#: Seconds between two attempts to reach the other end: doubled from the first to the second.
RETRY_FIRST, RETRY_LAST = 0.05, 3.0
#: Seconds a connection may take to say hello.
HELLO_PATIENCE = 2.0
#: Refused connections that stay open, so that their ends read why.
MOST_REFUSED = 4
#: Seconds after which a cable with one end only is worth a line in the log.
LONELY = 15.0

Log = logging.LoggerAdapter[logging.Logger]


class PeerLink:
    """One end of a link. ``hello.link`` is the name both ends must agree on."""

    offloads = spec.OFFLOADS

    def __init__(self, path: Path, hello: Hello, log: Log) -> None:
        self._path = path
        self._hello = hello
        self._log = log
        self._said = ""
        self._retry = RETRY_FIRST
        self._retrying = self._closed = self._paused = False
        self._listener: link.Listener | None = None
        #: A connection that has not said hello yet, and one that has.
        self._guest: tuple[socket.socket, Interest] | None = None
        self._peer: tuple[socket.socket, Interest] | None = None
        self._other: Hello | None = None
        self._refused: deque[socket.socket] = deque()
        self._connections = 0

    @property
    def up(self) -> bool:
        """See HostDev."""
        return self._peer is not None

    def open(self, worker: Worker, events: Events) -> None:
        """Start looking for the other end; it need not be there."""
        self._worker, self._events = worker, events
        worker.call(self._meet)
        worker.call_later(LONELY, self._lonely)

    # ---- meeting ---------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Connect, or listen, or try again later."""
        self._retrying = False
        if self._closed or self._peer or self._guest or self._listener:
            return
        try:
            sock = link.connect(self._path)
            if sock is not None:
                self._greet(sock)
                return
            listener = self._listener = link.Listener(self._path)
            self._worker.watch(listener.socket.fileno(), self._accept)
            self._log.info("%s: waiting for the other end at %s", self._hello.vdev, self._path)
        except BlockingIOError:
            # Another end is just about to listen: it will be there in a moment.
            self._again()
        except OSError as error:
            self._say(f"cannot reach the other end: {error.strerror or error}")
            self._again()

    def _again(self) -> None:
        if not self._retrying and not self._closed:
            self._retrying = True
            self._worker.call_later(self._retry, self._meet)
            self._retry = min(RETRY_LAST, 2 * self._retry)

    def _accept(self) -> None:
        assert self._listener is not None
        sock = self._listener.accept()
        if sock is None:
            return
        if self._peer is None and self._guest is None:
            self._greet(sock)
            return
        taken = f"the link is taken by {self._other.who}" if self._other else "the link is being taken"
        self._refuse(sock, taken)

    def _refuse(self, sock: socket.socket, why: str) -> None:
        """Say why, and no more. Not closed yet: it would read an error instead, if it sends meanwhile."""
        self._tell(sock, Hello(VERSION, self._hello.link, self._hello.vm, self._hello.vdev, refused=why))
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        self._refused.append(sock)
        if len(self._refused) > MOST_REFUSED:
            self._refused.popleft().close()

    def _tell(self, sock: socket.socket, hello: Hello) -> None:
        try:
            sock.send(encode(hello))
        except OSError as error:
            self._log.debug("%s: hello not sent: %s", self._hello.vdev, error)

    def _greet(self, sock: socket.socket) -> None:
        self._tell(sock, self._hello)
        interest = Interest(self._worker, sock.fileno(), self._answered, self._writable)
        self._guest = (sock, interest)
        interest.want(read=True)
        self._worker.call_later(HELLO_PATIENCE, lambda: self._too_late(sock))

    def _too_late(self, sock: socket.socket) -> None:
        if self._guest is not None and self._guest[0] is sock:
            self._dismiss("it does not say hello")

    def _answered(self) -> None:
        """The other end's hello has come, or it has gone."""
        assert self._guest is not None
        sock, interest = self._guest
        try:
            data = sock.recv(HELLO_BYTES_MAX + 1)
            other = decode(data)
            problem = refusal(self._hello, other)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            problem = str(error)
        if problem:
            self._dismiss(problem)
            return
        self._guest = None
        self._peer, self._other = (sock, interest), other
        self._connections += 1
        self._retry, self._said = RETRY_FIRST, ""
        interest.want(read=False)
        interest = Interest(self._worker, sock.fileno(), lambda: self._events.readable(0), self._writable)
        self._peer = (sock, interest)
        interest.want(read=not self._paused)
        self._log.info("%s: connected to %s", self._hello.vdev, other.who)
        for text in warnings(self._hello, other):
            self._log.warning("%s: link to %s: %s", self._hello.vdev, other.who, text)
        self._events.link_changed()

    def _dismiss(self, why: str) -> None:
        assert self._guest is not None
        sock, interest = self._guest
        self._guest = None
        interest.want(read=False, write=False)
        # Refused because of what was read: the other end deserves to know, too.
        self._refuse(sock, why)
        self._say(why)
        if self._listener is None:
            self._again()

    def _say(self, why: str) -> None:
        """One line per reason, not one per attempt."""
        if why != self._said:
            self._said = why
            self._log.warning("%s: peer link %s: %s", self._hello.vdev, self._path, why)

    def _lonely(self) -> None:
        if not self.up and not self._closed and not self._connections:
            self._log.warning(
                "%s: nobody has come to the other end of peer link %s yet; it is up when another VM "
                "names the same peer", self._hello.vdev, self._path,
            )  # fmt: skip

    def _lost(self) -> None:
        """The other end has gone: the cable is out until it is back."""
        if self._peer is None:
            return
        sock, interest = self._peer
        other, self._peer, self._other = self._other, None, None
        interest.want(read=False, write=False)
        sock.close()
        self._log.info("%s: %s has gone", self._hello.vdev, other.who if other else "the other end")
        self._events.link_changed()
        if self._listener is None:
            self._again()

    # ---- frames ----------------------------------------------------------------------------------

    def send(self, pair: int, message: Sequence[memoryview]) -> Sent:
        """See HostDev."""
        if self._peer is None:
            return Sent.NO_LINK
        sock, interest = self._peer
        try:
            sock.sendmsg(message)
        except BlockingIOError:
            interest.want(write=True)
            return Sent.BUSY
        except OSError as error:
            if error.errno in (errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM):
                return Sent.REFUSED
            self._lost()
            return Sent.NO_LINK
        return Sent.TAKEN

    def receive(self, pair: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """See HostDev."""
        if self._peer is None:
            return 0
        try:
            count = self._peer[0].recvmsg_into(buffers)[0]
        except BlockingIOError:
            return 0
        except OSError:
            count = 0
        if not count:
            # The end of the connection; nobody sends empty messages.
            self._lost()
            return 0
        return count

    def _writable(self) -> None:
        if self._peer is not None:
            self._peer[1].want(write=False)
            self._events.writable(0)

    def pause(self, pair: int, paused: bool) -> None:
        """See HostDev."""
        self._paused = paused
        if self._peer is not None:
            self._peer[1].want(read=not paused)

    def set_guest_offloads(self, offloads: int) -> None:
        """The receiver finishes what its driver does not take: nothing to tell the other end."""

    def set_pairs(self, pairs: int) -> bool:
        """See HostDev."""
        return pairs == 1

    def close(self) -> None:
        """See HostDev."""
        self._closed = True
        for held in (self._guest, self._peer):
            if held is not None:
                held[0].close()
        self._guest = self._peer = None
        while self._refused:
            self._refused.pop().close()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def status(self) -> Mapping[str, object]:
        """See HostDev."""
        other = self._other
        return {
            "hostdev": f"peer {self._path}",
            "other_end": other.who if other is not None else "nobody",
            "connections": self._connections,
        }
