"""Messages on the socket: read whole or not at all, with every length and descriptor accounted for.

A client may send anything. What does not have the shape of a message raises ClientError, and descriptors
that came with it are closed. Thread: the session's.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Sequence
from types import TracebackType

from qvm_vhost_user.protocol import (
    HEADER,
    NEED_REPLY,
    REPLY,
    SHAPES,
    TABLE_REGIONS,
    VERSION,
    VERSION_MASK,
    Request,
)
from qvmcore.api import ClientError

#: Room for the descriptors of one read; the kernel closes those that do not fit.
_ROOM = socket.CMSG_SPACE(TABLE_REGIONS * array.array("i").itemsize)


class Fd:
    """A descriptor that came from a client; its owner closes it, or hands it on with :meth:`take`."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def number(self) -> int:
        """The descriptor, -1 when it is closed or handed on."""
        return self._number

    def take(self) -> int:
        """The descriptor, which is the caller's from now on."""
        number, self._number = self._number, -1
        return number

    def close(self) -> None:
        """Close it, unless it was handed on; idempotent."""
        number = self.take()
        if number >= 0:
            os.close(number)


class Message:
    """A request with its payload and descriptors. A context manager that closes those left in it."""

    __slots__ = ("fds", "need_reply", "payload", "request")

    def __init__(self, request: Request, need_reply: bool, payload: bytes, fds: Sequence[Fd]) -> None:
        self.request = request
        self.need_reply = need_reply
        self.payload = payload
        self.fds = tuple(fds)

    def __enter__(self) -> Message:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _close_all(self.fds)


def receive(connection: socket.socket) -> Message | None:
    """The next message; None when the client has left. Raises ClientError for anything else than one."""
    fds: list[Fd] = []
    try:
        header = _read(connection, HEADER.size, fds)
        if not header:
            return None
        number, flags, size = HEADER.unpack(header)
        request = _checked(number, flags, size)
        payload = _read(connection, size, fds, "payload") if size else b""
        least, most = SHAPES[request].fds
        if not least <= len(fds) <= most:
            expected = f"{least}" if least == most else f"{least} to {most}"
            raise ClientError(f"{request.name} came with {len(fds)} descriptors, expected {expected}")
    except BaseException:
        _close_all(fds)
        raise
    return Message(request, bool(flags & NEED_REPLY), payload, fds)


def reply(connection: socket.socket, request: Request, payload: bytes, fd: int = -1) -> None:
    """Answer a request; ``fd``, which stays the caller's, goes with it. OSError when the client is gone."""
    data = HEADER.pack(request, VERSION | REPLY, len(payload)) + payload
    if fd < 0:
        connection.sendall(data)
        return
    sent = socket.send_fds(connection, [data], [fd])
    connection.sendall(data[sent:])


def _checked(number: int, flags: int, size: int) -> Request:
    """The request of a header, when it can be served. Raises ClientError."""
    if flags & VERSION_MASK != VERSION:
        raise ClientError(
            f"a message of version {flags & VERSION_MASK}, expected {VERSION}",
            hint="is it vhost-user that the client speaks?",
        )
    try:
        request = Request(number)
    except ValueError:
        raise ClientError(f"request {number}, which is unknown or was not offered") from None
    if flags & REPLY:
        raise ClientError(f"{request.name} is marked as a reply")
    shape = SHAPES[request]
    if not shape.fits(size):
        raise ClientError(f"{request.name} has a payload of {size} bytes, expected {shape}")
    return request


def _read(connection: socket.socket, size: int, fds: list[Fd], part: str = "") -> bytes:
    """Exactly ``size`` bytes, and the descriptors with them; nothing if a message could have begun there."""
    data = b""
    while len(data) < size:
        piece, ancillary, flags, _ = connection.recvmsg(size - len(data), _ROOM, socket.MSG_CMSG_CLOEXEC)
        fds += _descriptors(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise ClientError(
                f"more than {TABLE_REGIONS} descriptors came at once, or this process has no room for more"
            )
        if len(fds) > TABLE_REGIONS:
            # A few with every byte would be many.
            raise ClientError(f"more than {TABLE_REGIONS} descriptors came with one message")
        if not piece:
            if data or part:
                raise ClientError(f"it left in the middle of a message's {part or 'header'}")
            return b""
        data += piece
    return data


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[Fd]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return [Fd(number) for number in found]


def _close_all(fds: Iterable[Fd]) -> None:
    for fd in fds:
        fd.close()
