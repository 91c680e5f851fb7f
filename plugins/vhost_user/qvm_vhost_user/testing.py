"""The other side of the protocol: a vhost-user client for tests and benchmarks, without pytest.

:class:`Client` speaks it message by message, well or badly: :meth:`Client.send_raw` sends any bytes with
any descriptors. A virtio driver on top of it is in :mod:`qvm_vhost_user.testing_driver`.

::

    client = Client.connect("DIR/disk.sock")
    client.negotiate()
    client.set_mem_table([Region(0x8000_0000, size, USER, memfd)])

One thread. Numbers are in the byte order of the machine. Clauses: "vhost-user protocol" of QEMU's
interop documents, by message name.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qvm_vhost_user.protocol import (
    ADDRESS,
    CONFIG,
    F_PROTOCOL_FEATURES,
    HEADER,
    INFLIGHT,
    NEED_REPLY,
    NO_FD,
    REGION,
    REPLY,
    STATE,
    TABLE,
    U64,
    VERSION,
    ProtocolFeature,
    Request,
)
from qvm_vhost_user.testing_parts import BackendChannel

#: A feature bit that belongs to the protocol and not to virtio: log what is written.
F_LOG_ALL = 26
#: Most descriptors one message may carry on Linux (SCM_MAX_FD).
FDS_MAX = 253
#: Every protocol feature this client uses.
ALL_FEATURES = sum(feature.mask for feature in ProtocolFeature)


class Closed(Exception):
    """The server closed the connection."""


class Refused(Exception):
    """The server answered that it did not do what it was asked."""


class Received(NamedTuple):
    """A message as it came; its descriptors are the receiver's."""

    request: int
    flags: int
    payload: bytes
    fds: list[int]


class Region(NamedTuple):
    """A part of guest memory: guest-physical and client addresses, and the file it is in."""

    guest: int
    size: int
    user: int
    fd: int
    offset: int = 0

    def pack(self) -> bytes:
        """As it stands in a memory table."""
        return REGION.pack(self.guest, self.size, self.user, self.offset)


class Inflight(NamedTuple):
    """What the server wants remembered about requests it holds; the descriptor is the receiver's."""

    size: int
    offset: int
    queues: int
    queue_size: int
    fd: int

    def pack(self) -> bytes:
        """As it is sent back."""
        return INFLIGHT.pack(self.size, self.offset, self.queues, self.queue_size)


class Client:
    """One connection to a vhost-user server. A context manager; ``timeout`` seconds bound every wait.

    ``protocol`` are the protocol features in force. Requests raise Closed, or Refused when REPLY_ACK
    is in force, or TimeoutError.
    """

    def __init__(self, connection: socket.socket, timeout: float = 10.0) -> None:
        self.socket = connection
        connection.settimeout(timeout)
        self.protocol = 0

    @classmethod
    def connect(cls, path: Path | str, timeout: float = 10.0) -> Client:
        """Connect to a socket; OSError when nobody listens within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
                return cls(connection, timeout)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        """Leave; idempotent."""
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- bytes ---------------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Any bytes with any descriptors, which stay the caller's."""
        try:
            sent = socket.send_fds(self.socket, [data], list(fds)) if fds else 0
            if data[sent:]:  # sending nothing fails, too, when the server has closed already
                self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed(str(error)) from error

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """A message; ``size`` is what its header says, the truth by default."""
        header = HEADER.pack(request, flags, len(payload) if size is None else size)
        self.send_raw(header + payload, fds)

    def receive(self) -> Received:
        """The next message of the server, of at most 64 KiB."""
        fds: list[int] = []
        request, flags, size = HEADER.unpack(self._exactly(HEADER.size, fds))
        assert size <= 0x10000, f"the server announces a payload of {size} bytes"
        return Received(request, flags, self._exactly(size, fds), fds)

    def _exactly(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, new, _, _ = socket.recv_fds(self.socket, size - len(data), FDS_MAX)
            except ConnectionResetError as error:
                raise Closed(str(error)) from error
            fds += new
            if not part:
                raise Closed(f"the server closed the connection, {size - len(data)} bytes too early")
            data += part
        return data

    def closed(self) -> bool:
        """Wait until the server has closed; False, unless it does. What it still sends is dropped."""
        try:
            while True:
                for fd in self.receive().fds:
                    os.close(fd)
        except Closed:
            return True
        except TimeoutError:
            return False

    # ---- requests --------------------------------------------------------------------------------

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Received:
        """A request that has an answer of its own."""
        self.send(request, payload, fds)
        answer = self.receive()
        assert answer.request == request, f"asked {request}, answered {answer.request}"
        assert answer.flags & 7 == VERSION | REPLY, f"the flags of an answer are {answer.flags:#x}"
        return answer

    def ask_u64(self, request: int) -> int:
        """A request answered by a number."""
        (value,) = U64.unpack(self.ask(request).payload)
        return int(value)

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without an answer, acknowledged where REPLY_ACK is in force."""
        if not self.has(ProtocolFeature.REPLY_ACK):
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, flags=VERSION | NEED_REPLY)
        answer = self.receive()
        assert answer.request == request, f"told {request}, {answer.request} was acknowledged"
        (result,) = U64.unpack(answer.payload)
        if result:
            raise Refused(f"{_name(request)}: the server answers {result}")

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature is in force."""
        return bool(self.protocol >> feature & 1)

    def negotiate(self, wanted: int = ALL_FEATURES) -> int:
        """SET_OWNER and the protocol features both have; those in force."""
        self.tell(Request.SET_OWNER)
        if self.ask_u64(Request.GET_FEATURES) >> F_PROTOCOL_FEATURES & 1:
            self.set_protocol_features(self.ask_u64(Request.GET_PROTOCOL_FEATURES) & wanted)
        return self.protocol

    def set_protocol_features(self, features: int) -> None:
        """SET_PROTOCOL_FEATURES; in force from the next message on."""
        self.tell(Request.SET_PROTOCOL_FEATURES, U64.pack(features))
        self.protocol = features

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        """SET_MEM_TABLE: guest memory is this from now on."""
        table = TABLE.pack(len(regions), 0) + b"".join(region.pack() for region in regions)
        self.tell(Request.SET_MEM_TABLE, table, [region.fd for region in regions])

    def add_mem_reg(self, region: Region) -> None:
        """ADD_MEM_REG: one more region."""
        self.tell(Request.ADD_MEM_REG, U64.pack(0) + region.pack(), [region.fd])

    def rem_mem_reg(self, region: Region) -> None:
        """REM_MEM_REG: one less."""
        self.tell(Request.REM_MEM_REG, U64.pack(0) + region.pack())

    def set_vring(self, request: Request, index: int, value: int) -> None:
        """SET_VRING_NUM, _BASE or _ENABLE."""
        self.tell(request, STATE.pack(index, value))

    def set_vring_addr(self, index: int, desc: int, used: int, avail: int, flags: int = 0) -> None:
        """SET_VRING_ADDR, in addresses of the client."""
        self.tell(Request.SET_VRING_ADDR, ADDRESS.pack(index, flags, desc, used, avail, 0))

    def set_vring_fd(self, request: Request, index: int, fd: int | None) -> None:
        """SET_VRING_KICK, _CALL or _ERR; None sends no descriptor."""
        if fd is None:
            self.tell(request, U64.pack(index | NO_FD))
        else:
            self.tell(request, U64.pack(index), [fd])

    def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: stops the ring; where it was."""
        answered, base = STATE.unpack(self.ask(Request.GET_VRING_BASE, STATE.pack(index, 0)).payload)
        assert answered == index, f"asked for ring {index}, answered for {answered}"
        return int(base)

    def get_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG: bytes of the device configuration. Refused when the server says that it cannot."""
        answer = self.ask(Request.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(size)).payload
        if len(answer) < CONFIG.size + size:
            raise Refused(f"GET_CONFIG of {size} bytes at {offset}: {len(answer)} bytes came")
        return answer[CONFIG.size :]

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        """SET_CONFIG: the guest writes to the device configuration."""
        self.tell(Request.SET_CONFIG, CONFIG.pack(offset, len(data), flags) + data)

    def get_inflight(self, queues: int, queue_size: int) -> Inflight:
        """GET_INFLIGHT_FD: a buffer the server remembers requests in."""
        answer = self.ask(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, queue_size))
        assert len(answer.fds) == 1, f"{len(answer.fds)} descriptors came with GET_INFLIGHT_FD"
        size, offset, queues, queue_size = INFLIGHT.unpack(answer.payload)
        return Inflight(size, offset, queues, queue_size, answer.fds[0])

    def set_inflight(self, inflight: Inflight) -> None:
        """SET_INFLIGHT_FD: give that buffer back, to the same server or the next."""
        self.tell(Request.SET_INFLIGHT_FD, inflight.pack(), [inflight.fd])

    def backend_channel(self) -> BackendChannel:
        """SET_BACKEND_REQ_FD: a channel for requests of the server."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        return BackendChannel(ours)


def _name(request: int) -> str:
    return Request(request).name if request in set(Request) else f"message {request}"
