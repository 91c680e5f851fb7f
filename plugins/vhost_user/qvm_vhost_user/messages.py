"""What each message does, once it is known to have the right shape. Thread: the session's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qvm_vhost_user.buffer import InflightBuffer
from qvm_vhost_user.channel import BackendChannel
from qvm_vhost_user.hints import NET
from qvm_vhost_user.memory import MemoryTable, parse_single, parse_table
from qvm_vhost_user.protocol import (
    ADDRESS,
    BROKEN,
    CHANGING,
    CONFIG,
    F_PROTOCOL_FEATURES,
    F_RING_PACKED,
    FEATURES_OK,
    INDEX_MASK,
    MEM_SLOTS,
    NO_FD,
    STATE,
    U64,
    ProtocolFeature,
    Request,
)
from qvm_vhost_user.vrings import Addresses, Vrings
from qvm_vhost_user.wire import Fd, Message
from qvmcore.api import ClientError, GuestError, Served, VirtioVdev

#: Payload and descriptor, -1 for none, of a reply; None is answered by REPLY_ACK at most.
Answer = tuple[bytes, int] | None

PROTOCOL_FEATURES: Final = sum(feature.mask for feature in ProtocolFeature)

#: Refused messages of one client that are logged: it can send as many as it likes.
REFUSALS_LOGGED = 20

_OWN = 1 << F_PROTOCOL_FEATURES
#: The control queue of a network card, and what needs it: receive modes, VLANs, announcements, pairs, MAC.
_NET_CTRL_VQ = 1 << 17
_NEED_NET_CTRL_VQ = 1 << 18 | 1 << 19 | 1 << 21 | 1 << 22 | 1 << 23


class Messages:
    """The state of one connection, and its messages by name."""

    def __init__(self, served: Served, vdev: VirtioVdev, channel: BackendChannel) -> None:
        self._served = served
        self._vdev = vdev
        self._state = vdev.virtio
        self._channel = channel
        self._protocol = 0
        self._refusals = 0
        self._memory = MemoryTable(served.memory, self._state.remap)
        self._buffer: InflightBuffer | None = None
        self.rings = Vrings(vdev, self._memory.guest_address, self._inflight)
        self._methods: dict[Request, Callable[[Message], Answer]] = {
            request: getattr(self, f"_{request.name.lower()}") for request in Request
        }

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature is in force."""
        return bool(self._protocol & feature.mask)

    def perform(self, message: Message) -> Answer:
        """Do what it asks. Raises ClientError, GuestError, HostError, or whatever the vdev raises."""
        if message.request in CHANGING:
            self._served.used = True
        return self._methods[message.request](message)

    def refused(self, request: Request, error: GuestError) -> None:
        """Log what a guest, or its client, did wrong."""
        self._refusals += 1
        if self._refusals <= REFUSALS_LOGGED:
            # The text: whoever keeps the record would keep the memory that the error's traceback holds.
            self._served.log.warning("%s refused: %s", request.name, str(error))
        if self._refusals == REFUSALS_LOGGED:
            self._served.log.warning("further refusals to this client are not logged")

    def close(self) -> None:
        """Close all descriptors but those of the memory."""
        self.rings.close()
        self._channel.close()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    # ---- features and device ---------------------------------------------------------------------------

    def _get_features(self, message: Message) -> Answer:
        return U64.pack(self._state.offered | _OWN), -1

    def _set_features(self, message: Message) -> Answer:
        (value,) = U64.unpack(message.payload)
        features, state = self._complete(value & ~_OWN), self._state
        broken = bool(state.status & BROKEN)
        if state.status & FEATURES_OK and (broken or features != state.features):
            # Another driver: the guest has reset the device, which no other message need have told.
            self.rings.stop_all()
            self._begin_anew()
            if broken:
                state.reset()
        state.negotiate(features)
        if not value & _OWN:
            self.rings.enable_all()
        for error in self.rings.settle_all():
            self.refused(message.request, error)  # the features are in force
        return None

    def _complete(self, features: int) -> int:
        """With the control queue of a network card, when the client has features that need it.

        QEMU is such a queue's device itself, and acknowledges here neither the queue nor what it said.
        """
        if self._vdev.device_id == NET and features & _NEED_NET_CTRL_VQ:
            features |= self._state.offered & _NET_CTRL_VQ
        return features

    def _get_protocol_features(self, message: Message) -> Answer:
        return U64.pack(PROTOCOL_FEATURES), -1

    def _set_protocol_features(self, message: Message) -> Answer:
        (features,) = U64.unpack(message.payload)
        if features & ~PROTOCOL_FEATURES:
            unknown = features & ~PROTOCOL_FEATURES
            raise ClientError(f"SET_PROTOCOL_FEATURES accepts {unknown:#x}, which were not offered")
        self._protocol = features
        return None

    def _set_owner(self, message: Message) -> Answer:
        return None

    def _reset_owner(self, message: Message) -> Answer:
        self.rings.disable_all()
        return None

    def _reset_device(self, message: Message) -> Answer:
        self.rings.disable_all()
        self._begin_anew()
        self._served.reset()
        return None

    def _get_status(self, message: Message) -> Answer:
        return U64.pack(self._state.status), -1

    def _set_status(self, message: Message) -> Answer:
        (status,) = U64.unpack(message.payload)
        if status > 0xFF:
            raise ClientError(f"SET_STATUS {status:#x}: the device status has 8 bits")
        if status:
            self._state.write_status(status)
            return None
        # There are clients that say this before they ask where the rings stand, to pause a guest.
        self.rings.stop_all()
        self.rings.silence()
        self._served.reset()
        return None

    def _get_queue_num(self, message: Message) -> Answer:
        return U64.pack(len(self._vdev.queue_sizes)), -1

    # ---- memory ------------------------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> Answer:
        self._memory.replace(parse_table(message.payload), message.fds)
        return None

    def _get_max_mem_slots(self, message: Message) -> Answer:
        return U64.pack(MEM_SLOTS), -1

    def _add_mem_reg(self, message: Message) -> Answer:
        self._memory.add(parse_single(message.payload), message.fds[0])
        return None

    def _rem_mem_reg(self, message: Message) -> Answer:
        self._memory.remove(parse_single(message.payload))
        return None

    # ---- rings -------------------------------------------------------------------------------------------

    def _set_vring_num(self, message: Message) -> Answer:
        self.rings.set_size(*STATE.unpack(message.payload))
        return None

    def _set_vring_addr(self, message: Message) -> Answer:
        index, flags, desc, used, available, _ = ADDRESS.unpack(message.payload)
        if flags:
            raise ClientError(f"SET_VRING_ADDR has flags {flags:#x}; a log of writes was not offered")
        self.rings.set_addresses(index, Addresses(desc, available, used))
        return None

    def _set_vring_base(self, message: Message) -> Answer:
        self.rings.set_position(*STATE.unpack(message.payload))
        return None

    def _get_vring_base(self, message: Message) -> Answer:
        index, _ = STATE.unpack(message.payload)
        return STATE.pack(index, self.rings.take_base(index)), -1

    def _set_vring_kick(self, message: Message) -> Answer:
        index, fd = _ring_and_fd(message)
        if fd is None:
            raise ClientError(
                f"ring {index} shall be polled, without a kick descriptor, which is not supported",
                hint="the client has to pass an eventfd; QEMU does with KVM or TCG and ioeventfd=on",
            )
        self.rings.set_kick(index, fd)
        return None

    def _set_vring_call(self, message: Message) -> Answer:
        self.rings.set_call(*_ring_and_fd(message))
        return None

    def _set_vring_err(self, message: Message) -> Answer:
        self.rings.set_error(*_ring_and_fd(message))
        return None

    def _set_vring_enable(self, message: Message) -> Answer:
        index, enabled = STATE.unpack(message.payload)
        if enabled > 1:
            raise ClientError(f"SET_VRING_ENABLE says {enabled} for ring {index}, expected 0 or 1")
        self.rings.enable(index, bool(enabled))
        return None

    # ---- configuration -----------------------------------------------------------------------------------

    def _get_config(self, message: Message) -> Answer:
        offset, size, _ = _config(message)
        config = self._state.config
        if not size or offset >= config.length:
            # An answer without a payload says that there is none.
            return b"", -1
        return message.payload[: CONFIG.size] + config.read(offset, size).to_bytes(size, "little"), -1

    def _set_config(self, message: Message) -> Answer:
        offset, size, flags = _config(message)
        # It writes for the guest, or restores a device that has migrated.
        if flags > 1:
            raise ClientError(f"SET_CONFIG has flags {flags:#x}, expected 0 or 1")
        if not size or offset + size > self._state.config.length:
            length = self._state.config.length
            raise GuestError(f"[{offset}, +{size}) is not inside the {length} bytes of the configuration")
        value = int.from_bytes(message.payload[CONFIG.size :], "little")
        self._state.write_config(offset, size, value)
        return None

    def _set_backend_req_fd(self, message: Message) -> Answer:
        self._channel.set(message.fds[0])
        return None

    # ---- in flight -----------------------------------------------------------------------------------------

    def _get_inflight_fd(self, message: Message) -> Answer:
        buffer = InflightBuffer.create(message.payload, len(self._vdev.queue_sizes))
        self._keep(buffer)
        return buffer.describe(len(message.payload)), buffer.fd

    def _set_inflight_fd(self, message: Message) -> Answer:
        self._keep(InflightBuffer.adopt(message.payload, message.fds[0], len(self._vdev.queue_sizes)))
        return None

    def _keep(self, buffer: InflightBuffer) -> None:
        """For rings that start from now on; one that runs keeps what it has."""
        old, self._buffer = self._buffer, buffer
        if old is not None:
            old.close()

    def _inflight(self, index: int, size: int) -> object:
        if self._buffer is None:
            return None
        return self._buffer.queue(index, size, bool(self._state.features >> F_RING_PACKED & 1))

    def _begin_anew(self) -> None:
        self.rings.begin_anew()
        if self._buffer is not None:
            self._buffer.clear()


def _ring_and_fd(message: Message) -> tuple[int, Fd | None]:
    """The ring of KICK, CALL or ERR, and its descriptor. Raises ClientError when the two do not fit."""
    (value,) = U64.unpack(message.payload)
    name, without = message.request.name, bool(value & NO_FD)
    if value & ~(INDEX_MASK | NO_FD):
        raise ClientError(f"{name} has the number {value:#x}, expected a ring up to 255 and bit 8 at most")
    if without == bool(message.fds):
        told = "none" if without else "one"
        raise ClientError(f"{name} announces {told} and came with {len(message.fds)} descriptors")
    return value & INDEX_MASK, message.fds[0] if message.fds else None


def _config(message: Message) -> tuple[int, int, int]:
    """Offset, size and flags of a configuration access. Raises ClientError when its length does not fit."""
    offset, size, flags = CONFIG.unpack_from(message.payload)
    room = len(message.payload) - CONFIG.size
    if size != room:
        raise ClientError(f"{message.request.name} says {size} bytes and has {room}")
    return offset, size, flags
