"""A vfio-user client for tests: good messages by default, any bytes and descriptors on demand.

Its numbers are its own, read from QEMU's docs/interop/vfio-user.rst, so that an error in the server's
is not made here as well. One thread at a time. Used by tests only.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum, IntFlag
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

#: Message ID, command, size with this header, flags, errno.
HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 0x1, 0x10, 0x20
_TYPE_MASK = 0xF
#: Seconds after which QEMU gives a server up.
PATIENCE = 5.0
#: Descriptors Linux passes in one message (SCM_MAX_FD).
FDS_MAX = 253
#: What a client may ask for at once when nothing else was agreed upon.
DATA_MAX = 1 << 20


class Command(IntEnum):
    """Every command of the protocol, and 14, which older texts call DIRTY_PAGES."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    RESET = 13
    DIRTY_PAGES = 14
    WRITE_MULTI = 15
    FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Irq(IntFlag):
    """Flags of SET_IRQS: one DATA and one ACTION."""

    NONE = 0x01
    BOOL = 0x02
    EVENTFD = 0x04
    MASK = 0x08
    UNMASK = 0x10
    TRIGGER = 0x20


#: Index of configuration space among the regions; BAR n is region n.
CONFIG_REGION, REGIONS = 7, 9
INTX, MSI, MSIX, IRQS = 0, 1, 2, 5
MAP_READ, MAP_WRITE = 1, 2
UNMAP_ALL = 2

MAP = struct.Struct("<IIQQQ")  # argsz, flags, offset, address, size
UNMAP = struct.Struct("<IIQQ")  # argsz, flags, address, size
INFO = struct.Struct("<IIII")  # argsz, flags, regions, irqs; for an IRQ: argsz, flags, index, count
REGION_INFO = struct.Struct("<IIIIQQ")  # argsz, flags, index, capability offset, size, offset
SET_IRQS = struct.Struct("<IIIII")  # argsz, flags, index, start, count
ACCESS = struct.Struct("<QII")  # offset, region, count
MULTI = struct.Struct("<QII8s")  # the same and the data


class Refused(Exception):
    """The server answered a message with an error; ``errno`` is its number, 0 when it gave none."""

    def __init__(self, command: int, errno: int) -> None:
        super().__init__(
            f"command {command} was refused: {os.strerror(errno) if errno else 'no reason given'}"
        )
        self.errno = errno


class Gone(Exception):
    """The server closed the connection."""


class Reply(NamedTuple):
    """A message from the server; ``fds`` are the receiver's to close."""

    id: int
    command: int
    flags: int
    errno: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether it is an error."""
        return bool(self.flags & ERROR)


class Region(NamedTuple):
    """What GET_REGION_INFO said: flags 1 readable, 2 writable, 4 mappable; ``size`` in bytes."""

    flags: int
    size: int


class Client:
    """One connection. A context manager; ``socket`` may be used directly.

    ::

        with Client.connect(path) as client:
            client.version()
            assert client.read(CONFIG_REGION, 0, 2) == 0x1AF4
    """

    def __init__(self, connection: socket.socket, patience: float = PATIENCE) -> None:
        connection.settimeout(patience)
        self.socket = connection
        #: What the server can do, from its answer to :meth:`version`.
        self.capabilities: dict[str, Any] = {}
        self._ids = itertools.count(1)

    @classmethod
    def connect(cls, path: Path, patience: float = PATIENCE) -> Client:
        """A connection to the socket at ``path``. Raises OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(str(path))  # waits while too many others do, which one with a timeout does not
        except OSError:
            connection.close()
            raise
        return cls(connection, patience)

    def close(self) -> None:
        """Leave; idempotent."""
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- any bytes -------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, with descriptors on the first of them. Gone, TimeoutError."""
        try:
            if fds:
                sent = socket.send_fds(self.socket, [data], list(fds), socket.MSG_NOSIGNAL)
                data = data[sent:]
            self.socket.sendall(data, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone("the server closed the connection") from error

    def post(
        self,
        command: int,
        payload: bytes = b"",
        *,
        fds: Sequence[int] = (),
        flags: int = 0,
        size: int | None = None,
        errno: int = 0,
    ) -> int:
        """Send one message, without waiting for an answer; its ID. ``size`` may lie."""
        number = next(self._ids) & 0xFFFF
        length = HEADER.size + len(payload) if size is None else size
        self.send(HEADER.pack(number, command, length, flags, errno) + payload, fds)
        return number

    def receive(self) -> Reply:
        """The next message of the server. Gone at its end, TimeoutError when nothing comes."""
        head, fds = self._exactly(HEADER.size)
        number, command, size, flags, errno = HEADER.unpack(head)
        assert HEADER.size <= size <= HEADER.size + ACCESS.size + DATA_MAX, f"a message of {size} bytes"
        payload, more = self._exactly(size - HEADER.size)
        return Reply(number, command, flags, errno, payload, fds + more)

    def ask(self, command: int, payload: bytes = b"", **options: Any) -> Reply:
        """Send a message and take its answer, also one that refuses."""
        number = self.post(command, payload, **options)
        reply = self.receive()
        assert (reply.id, reply.command) == (number, command), f"{reply} answers {number}, {command}"
        assert reply.flags & _TYPE_MASK == REPLY and not reply.fds
        assert not (reply.refused and reply.payload), "an error carries a header only"
        return reply

    def request(self, command: int, payload: bytes = b"", **options: Any) -> bytes:
        """The payload of the answer. Raises Refused for an error."""
        reply = self.ask(command, payload, **options)
        if reply.refused:
            raise Refused(command, reply.errno)
        return reply.payload

    # ---- the protocol ----------------------------------------------------------------------------

    def version(self, capabilities: Mapping[str, Any] | None = None, minor: int = 1) -> tuple[int, int]:
        """Agree on a version, the first message; the server's major and minor."""
        own = {"max_msg_fds": 8, "max_data_xfer_size": DATA_MAX, "write_multiple": True}
        text = json.dumps({"capabilities": own if capabilities is None else dict(capabilities)})
        sent = struct.pack("<HH", 0, minor) + text.encode() + b"\0"
        got = self.request(Command.VERSION, sent)
        agreed = struct.unpack_from("<HH", got)
        if len(got) > 4:
            assert got.endswith(b"\0"), f"the version data do not end in NUL: {got!r}"
            self.capabilities = json.loads(got[4:-1]).get("capabilities", {})
        return agreed[0], agreed[1]

    def info(self) -> tuple[int, int, int]:
        """GET_INFO: flags (1 can be reset, 2 is PCI), number of regions, number of interrupt types."""
        _, flags, regions, irqs = INFO.unpack(self.request(Command.GET_INFO, INFO.pack(INFO.size, 0, 0, 0)))
        return flags, regions, irqs

    def region(self, index: int) -> Region:
        """GET_REGION_INFO."""
        asked = REGION_INFO.pack(REGION_INFO.size, 0, index, 0, 0, 0)
        _, flags, same, _, size, _ = REGION_INFO.unpack_from(self.request(Command.GET_REGION_INFO, asked))
        assert same == index
        return Region(flags, size)

    def irq(self, index: int) -> tuple[int, int]:
        """GET_IRQ_INFO: flags (1 eventfd, 2 maskable, 4 masks itself, 8 set as a whole) and count."""
        asked = INFO.pack(INFO.size, 0, index, 0)
        _, flags, same, count = INFO.unpack(self.request(Command.GET_IRQ_INFO, asked))
        assert same == index
        return flags, count

    def set_irqs(
        self,
        flags: int,
        index: int,
        start: int = 0,
        count: int = 1,
        *,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """SET_IRQS; ``fds`` are eventfds to be signalled, none takes them back."""
        head = SET_IRQS.pack(SET_IRQS.size + len(data), flags, index, start, count)
        assert self.request(Command.SET_IRQS, head + data, fds=fds) == b""

    def read(self, region: int, offset: int, size: int) -> int:
        """REGION_READ of up to 8 bytes as a number; Refused when the server does."""
        return int.from_bytes(self.read_bytes(region, offset, size), "little")

    def read_bytes(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ."""
        head = ACCESS.pack(offset, region, count)
        got = self.request(Command.REGION_READ, head)
        assert got[: len(head)] == head and len(got) == len(head) + count, got[:32].hex()
        return got[len(head) :]

    def write(self, region: int, offset: int, size: int, value: int, *, posted: bool = False) -> None:
        """REGION_WRITE; ``posted`` asks for no answer, as QEMU does for BARs."""
        head = ACCESS.pack(offset, region, size)
        data = head + value.to_bytes(size, "little")
        if posted:
            self.post(Command.REGION_WRITE, data, flags=NO_REPLY)
        else:
            assert self.request(Command.REGION_WRITE, data) == head

    def write_multi(self, writes: Sequence[tuple[int, int, int, int]], *, posted: bool = True) -> None:
        """WRITE_MULTI of (region, offset, size, value); QEMU sends it posted."""
        data = struct.pack("<Q", len(writes))
        for region, offset, size, value in writes:
            data += MULTI.pack(offset, region, size, value.to_bytes(8, "little"))
        if posted:
            self.post(Command.WRITE_MULTI, data, flags=NO_REPLY)
        else:
            assert self.request(Command.WRITE_MULTI, data) == data[:8]

    def dma_map(self, address: int, size: int, fd: int | None, offset: int = 0, flags: int = 3) -> None:
        """DMA_MAP of ``size`` bytes at ``offset`` of a file, or of memory that is not shared."""
        asked = MAP.pack(MAP.size, flags, offset, address, size)
        assert self.request(Command.DMA_MAP, asked, fds=() if fd is None else (fd,)) == b""

    def dma_unmap(self, address: int, size: int, flags: int = 0) -> None:
        """DMA_UNMAP."""
        asked = UNMAP.pack(UNMAP.size, flags, address, size)
        assert self.request(Command.DMA_UNMAP, asked) == asked

    def reset(self) -> None:
        """DEVICE_RESET."""
        assert self.request(Command.RESET) == b""

    # ---- inside ------------------------------------------------------------------------------------

    def _exactly(self, count: int) -> tuple[bytes, tuple[int, ...]]:
        data, fds = b"", []
        while len(data) < count:
            try:
                piece, came, _, _ = socket.recv_fds(self.socket, count - len(data), FDS_MAX)
            except ConnectionResetError as error:
                raise Gone("the server reset the connection") from error
            fds += came
            if not piece:
                raise Gone("the server closed the connection")
            data += piece
        return data, tuple(fds)
