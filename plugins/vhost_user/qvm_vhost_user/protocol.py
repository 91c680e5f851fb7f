"""Numbers of the vhost-user protocol, and the shape of every message that is served.

Clauses: "vhost-user protocol" of QEMU's interop documents, by message name. Numbers in messages are in the
byte order of the machine.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

#: Flags of a header: version 1 in the low two bits.
VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY: Final = 4
NEED_REPLY: Final = 8

#: The virtio feature bit the protocol took for itself (30 is reserved in virtio, 6.3).
F_PROTOCOL_FEATURES: Final = 30

#: Virtio's own numbers: bits of the device status (2.1), and of features (6).
FEATURES_OK: Final = 8
#: DEVICE_NEEDS_RESET or FAILED: only a reset helps.
BROKEN: Final = 64 | 128
F_RING_PACKED: Final = 34
F_IN_ORDER: Final = 35
F_RING_RESET: Final = 40

#: In the payload of KICK, CALL and ERR: the number of the ring, and "no descriptor is sent".
INDEX_MASK: Final = 0xFF
NO_FD: Final = 1 << 8

#: Regions of one SET_MEM_TABLE, and memory slots of ADD_MEM_REG.
TABLE_REGIONS: Final = 8
MEM_SLOTS: Final = 64
#: Largest configuration access; the largest configuration of the standard is far smaller.
CONFIG_MAX: Final = 256

HEADER: Final = struct.Struct("=III")
U64: Final = struct.Struct("=Q")
STATE: Final = struct.Struct("=II")
#: index, flags, descriptor, used, available, log
ADDRESS: Final = struct.Struct("=IIQQQQ")
TABLE: Final = struct.Struct("=II")
#: guest address, size, user address, offset in the file
REGION: Final = struct.Struct("=QQQQ")
SINGLE: Final = struct.Struct("=QQQQQ")
#: offset, size, flags
CONFIG: Final = struct.Struct("=III")
#: size and offset of the buffer, number of queues, their size
INFLIGHT: Final = struct.Struct("=QQHH")


class Request(enum.IntEnum):
    """What a client may ask."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(enum.IntEnum):
    """What we ask of a client, on its back-end channel."""

    CONFIG_CHANGE = 2


class ProtocolFeature(enum.IntEnum):
    """Bits of GET_PROTOCOL_FEATURES that are served."""

    MQ = 0
    REPLY_ACK = 3
    BACKEND_REQ = 5
    CONFIG = 9
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16

    @property
    def mask(self) -> int:
        """The bit as a number."""
        return 1 << self.value


class Shape(NamedTuple):
    """Lengths of payload a message may have, in bytes, and how many descriptors come with it."""

    least: int
    most: int
    step: int = 1
    fds: tuple[int, int] = (0, 0)

    def fits(self, size: int) -> bool:
        """Whether a payload of ``size`` bytes can be right."""
        return self.least <= size <= self.most and (size - self.least) % self.step == 0

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


def _exactly(form: struct.Struct | None, fds: tuple[int, int] = (0, 0)) -> Shape:
    size = form.size if form is not None else 0
    return Shape(size, size, 1, fds)


_NOTHING = _exactly(None)
# The description of the buffer ends in padding with clients whose compiler put it there.
_INFLIGHT_SIZES = (INFLIGHT.size, INFLIGHT.size + 4, 4)

#: Every message that is served.
SHAPES: Final[Mapping[Request, Shape]] = {
    Request.GET_FEATURES: _NOTHING,
    Request.SET_FEATURES: _exactly(U64),
    Request.SET_OWNER: _NOTHING,
    Request.RESET_OWNER: _NOTHING,
    Request.SET_MEM_TABLE: Shape(
        TABLE.size, TABLE.size + TABLE_REGIONS * REGION.size, REGION.size, (0, TABLE_REGIONS)
    ),
    Request.SET_VRING_NUM: _exactly(STATE),
    Request.SET_VRING_ADDR: _exactly(ADDRESS),
    Request.SET_VRING_BASE: _exactly(STATE),
    Request.GET_VRING_BASE: _exactly(STATE),
    Request.SET_VRING_KICK: _exactly(U64, (0, 1)),
    Request.SET_VRING_CALL: _exactly(U64, (0, 1)),
    Request.SET_VRING_ERR: _exactly(U64, (0, 1)),
    Request.GET_PROTOCOL_FEATURES: _NOTHING,
    Request.SET_PROTOCOL_FEATURES: _exactly(U64),
    Request.GET_QUEUE_NUM: _NOTHING,
    Request.SET_VRING_ENABLE: _exactly(STATE),
    Request.SET_BACKEND_REQ_FD: _exactly(None, (1, 1)),
    Request.GET_CONFIG: Shape(CONFIG.size, CONFIG.size + CONFIG_MAX),
    Request.SET_CONFIG: Shape(CONFIG.size, CONFIG.size + CONFIG_MAX),
    Request.GET_INFLIGHT_FD: Shape(*_INFLIGHT_SIZES),
    Request.SET_INFLIGHT_FD: Shape(*_INFLIGHT_SIZES, (1, 1)),
    Request.RESET_DEVICE: _NOTHING,
    Request.GET_MAX_MEM_SLOTS: _NOTHING,
    Request.ADD_MEM_REG: _exactly(SINGLE, (1, 1)),
    # A descriptor serves nothing here, but there are clients that send one.
    Request.REM_MEM_REG: _exactly(SINGLE, (0, 1)),
    Request.SET_STATUS: _exactly(U64),
    Request.GET_STATUS: _NOTHING,
}

#: Messages that have to be allowed by a protocol feature first.
NEEDS: Final[Mapping[Request, ProtocolFeature]] = {
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: ProtocolFeature.STATUS,
    Request.GET_STATUS: ProtocolFeature.STATUS,
}

#: Messages with an answer of their own.
ANSWERED: Final = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_VRING_BASE,
        Request.GET_CONFIG,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
    }
)

#: Messages after which the device is not as new any more.
CHANGING: Final = frozenset(
    {
        Request.SET_FEATURES,
        Request.SET_MEM_TABLE,
        Request.ADD_MEM_REG,
        Request.REM_MEM_REG,
        Request.SET_CONFIG,
        Request.SET_STATUS,
        Request.RESET_DEVICE,
    }
)
