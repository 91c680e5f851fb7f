"""Messages on the socket: framing, limits, and the descriptors that belong to each one.

A read takes what there is, often several posted writes at once. Descriptors arrive with the first byte
of what was sent with them, and a read never goes past the piece they came with (unix(7)); so they belong
to the last message that begins in what was read.
"""

from __future__ import annotations

import array
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qvm_vfio_user import spec
from qvm_vfio_user.descriptors import Descriptors
from qvm_vfio_user.spec import Command
from qvmcore.api import ClientError

#: What the server takes: bytes of data in one message, descriptors with one (QEMU refuses more than 16).
TRANSFER_MAX, FDS_MAX = 1 << 16, 16
#: The longest JSON of a VERSION, and the longest message of a command that is not known.
TEXT_MAX = 4096

_READ_SIZE = 4096
_ANCILLARY = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
#: As a plain number: an operator of socket's own enumeration takes microseconds.
_CTRUNC = int(socket.MSG_CTRUNC)
_KNOWN_FLAGS = spec.TYPE_MASK | spec.NO_REPLY


@dataclass(frozen=True, slots=True)
class Shape:
    """How long the payload of a command may be, and how many descriptors come with it at most."""

    least: int
    most: int
    fds: int = 0


def _fixed(size: int, fds: int = 0) -> Shape:
    return Shape(size, size, fds)


SHAPES: Mapping[int, Shape] = {
    Command.VERSION: Shape(spec.VERSION.size, spec.VERSION.size + TEXT_MAX),
    Command.DMA_MAP: _fixed(spec.DMA_MAP.size, fds=1),
    # A request for a bitmap of dirty pages is longer, and refused.
    Command.DMA_UNMAP: Shape(spec.DMA_UNMAP.size, spec.DMA_UNMAP.size + 16),
    Command.DEVICE_GET_INFO: _fixed(spec.DEVICE_INFO.size),
    Command.DEVICE_GET_REGION_INFO: _fixed(spec.REGION_INFO.size),
    Command.DEVICE_GET_IRQ_INFO: _fixed(spec.IRQ_INFO.size),
    Command.DEVICE_SET_IRQS: Shape(spec.SET_IRQS.size, spec.SET_IRQS.size + 2048, FDS_MAX),
    Command.REGION_READ: _fixed(spec.ACCESS.size),
    Command.REGION_WRITE: Shape(spec.ACCESS.size, spec.ACCESS.size + TRANSFER_MAX),
    Command.DEVICE_RESET: _fixed(0),
    Command.REGION_WRITE_MULTI: Shape(spec.WRITE_COUNT.size, spec.WRITE_COUNT.size + TRANSFER_MAX),
}
_UNKNOWN = Shape(0, TEXT_MAX)


class Refused(Exception):
    """A message asks for what cannot be: it is answered with ``errno``, and the connection goes on."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno


class Disconnected(Exception):
    """The client is gone, or the core has shut the socket down, so an answer reaches nobody."""


@dataclass(slots=True)
class Message:
    """One request. Its size and the number of its descriptors are what its command allows."""

    id: int
    command: int
    no_reply: bool
    payload: bytes
    fds: Descriptors

    @property
    def name(self) -> str:
        """``DMA_MAP``, or the number of a command that is not known."""
        return name_of(self.command)


def name_of(command: int) -> str:
    """How log lines call a command."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


#: Of a message that came without any; nobody adds to it.
_NONE = Descriptors()


class Connection:
    """The server's side of one connection. One thread, the socket's; the socket is not closed here.

    ``wait`` is called before the socket is read, and may wait for it and for other things.
    """

    def __init__(
        self, connection: socket.socket, wait: Callable[[], None] = lambda: None, poll: float = 0.0
    ) -> None:
        self._socket = connection
        self._wait = wait
        self._poll_ns = int(poll * 1e9)
        self._ready = select.poll()
        self._ready.register(connection, select.POLLIN)
        self._data = b""  # what was read; up to ``_at`` it was given out as messages
        self._at = 0
        self._passed = 0  # bytes of the stream that came before ``_data``
        self._fds: dict[int, Descriptors] = {}  # by where in the stream their message begins

    def receive(self) -> Message | None:
        """The next message, None when the client has left. Waits. Raises ClientError for what is none."""
        while (message := self._cut()) is None:
            if not self._read():
                left = len(self._data) - self._at
                if left:
                    raise ClientError(f"the client left in the middle of a message, {left} bytes in")
                return None
        return message

    def reply(self, message: Message, payload: bytes = b"") -> None:
        """Answer, unless no answer was asked for. Raises Disconnected."""
        if not message.no_reply:
            size = spec.HEADER.size + len(payload)
            self._send(spec.HEADER.pack(message.id, message.command, size, spec.REPLY, 0) + payload)

    def refuse(self, message: Message, errno: int) -> None:
        """Answer with an error, a header only, unless no answer was asked for. Raises Disconnected."""
        if not message.no_reply:
            flags = spec.REPLY | spec.ERROR
            self._send(spec.HEADER.pack(message.id, message.command, spec.HEADER.size, flags, errno))

    def close(self) -> None:
        """Close the descriptors of messages that were not given out; idempotent."""
        while self._fds:
            self._fds.popitem()[1].close()

    # ---- inside ------------------------------------------------------------------------------------

    def _cut(self) -> Message | None:
        """A whole message off the front of what was read."""
        data, at = self._data, self._at
        if len(data) - at < spec.HEADER.size:
            return None
        number, command, size, flags, _ = spec.HEADER.unpack_from(data, at)
        shape = SHAPES.get(command, _UNKNOWN)
        length = size - spec.HEADER.size
        if not shape.least <= length <= shape.most or flags & ~spec.NO_REPLY:
            raise ClientError(_complaint(command, shape, length, flags))
        end = at + size
        if len(data) < end:
            return None
        self._at = end
        fds = _NONE
        if self._fds:
            fds = self._fds.pop(self._passed + at, _NONE)
            if len(fds) > shape.fds:
                count = len(fds)
                fds.close()
                name = name_of(command)
                raise ClientError(f"{name} with {count} descriptors; expected at most {shape.fds}")
        return Message(number, command, flags != 0, data[at + spec.HEADER.size : end], fds)

    def _read(self) -> int:
        """Read what there is, at least a byte; 0 when the client has left."""
        size = _READ_SIZE
        if self._at:
            self._passed += self._at
            self._data, self._at = self._data[self._at :], 0
        if self._data:
            size = max(size, self._missing())
        if not self._look():
            self._wait()
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return 0  # reset by the client
        self._data += data
        if ancillary or flags & _CTRUNC:
            self._adopt(ancillary, bool(flags & _CTRUNC))
        return len(data)

    def _look(self) -> bool:
        """Whether something came while the thread looked for it, as the user asked."""
        if not self._poll_ns:
            return False
        ready, now = self._ready.poll, time.perf_counter_ns
        end = now() + self._poll_ns
        while not ready(0):
            if now() >= end:
                return False
        return True

    def _missing(self) -> int:
        """Bytes the message in hand still lacks; its size was checked."""
        if len(self._data) < spec.HEADER.size:
            return 0
        return int(spec.HEADER.unpack_from(self._data)[2]) - len(self._data)

    def _adopt(self, ancillary: list[tuple[int, int, bytes]], cut: bool) -> None:
        """Give what came beside the data to its message. Raises ClientError for more than a message has."""
        came = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                came.frombytes(data[: len(data) - len(data) % came.itemsize])
        fds = self._fds.setdefault(self._passed + self._last_start(), Descriptors())
        fds.add(Descriptors(came))
        if cut or len(fds) > FDS_MAX:
            raise ClientError(f"more descriptors came with a message than can be taken; at most {FDS_MAX}")

    def _last_start(self) -> int:
        """Where in what was read the last message begins."""
        data, start = self._data, 0
        while len(data) - start >= spec.HEADER.size:
            size = spec.HEADER.unpack_from(data, start)[2]
            if size < spec.HEADER.size or start + size >= len(data):
                break
            start += size
        return start

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Disconnected(error.strerror) from error


def _complaint(command: int, shape: Shape, length: int, flags: int) -> str:
    """What is wrong with a header."""
    name = name_of(command)
    if flags & spec.TYPE_MASK == spec.REPLY:
        return f"a reply to {name}, which was not asked"
    if flags & ~_KNOWN_FLAGS or flags & spec.TYPE_MASK:
        return f"{name} with flags {flags:#x}; expected 0, or {spec.NO_REPLY:#x} for no reply"
    if length < 0:
        return f"{name} in {spec.HEADER.size + length} bytes; the header alone has {spec.HEADER.size}"
    expected = f"{shape.least}" if shape.least == shape.most else f"{shape.least} to {shape.most}"
    return f"{name} with {length} bytes; expected {expected}"
