"""A guest's virtio driver on the far side of vhost-user: what the rings of qvmcore.testing hang on.

::

    driver = VhostUserDriver(Client.connect(path), GuestMemory.allocate(RAM), queue_sizes=(256,))
    driver.start()
    request = driver.queues[0].submit([header], [512, 1])
    driver.wait(0)

It does what a VMM does: the device status lives here, and the device hears of rings and memory at
DRIVER_OK, unless STATUS is in force. The protocol does not tell how large a queue may be, so the
caller must know.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvm_vhost_user.protocol import F_PROTOCOL_FEATURES, U64, ProtocolFeature, Request
from qvm_vhost_user.testing import (
    ALL_FEATURES,
    F_LOG_ALL,
    Client,
    Inflight,
    Refused,
    Region,
)
from qvm_vhost_user.testing_parts import BackendChannel, Vring
from qvmcore.testing.driver import VirtioDriver
from qvmcore.testing.ring import GuestRam, RingDriver

if TYPE_CHECKING:
    from qvmcore.api import GuestMemory

#: Client addresses are guest-physical ones plus this, so that neither passes for the other.
USER = 0x7E00_0000_0000

_DRIVER_OK, _FEATURES_OK, _NEEDS_RESET = 4, 8, 64
_PACKED, _VERSION_1 = 34, 32
#: The position of a fresh packed ring: both wrap counters are 1 (virtio 1.4, 2.8.1).
_FRESH_PACKED = 0x8000_8000
_OWN_BITS = 1 << F_LOG_ALL | 1 << F_PROTOCOL_FEATURES


class VhostUserDriver(VirtioDriver):
    """The driver of one virtio device behind a vhost-user server. A context manager.

    ``queue_sizes`` are what the device allows; ``protocol`` limits the protocol features used.
    ``inflight`` is the buffer of INFLIGHT_SHMFD once rings run with it.
    """

    def __init__(
        self,
        client: Client,
        memory: GuestMemory,
        queue_sizes: Sequence[int],
        *,
        protocol: int = ALL_FEATURES,
        ram: GuestRam | None = None,
    ) -> None:
        super().__init__(ram or GuestRam(memory))
        self.client = client
        self.memory = memory
        self.inflight: Inflight | None = None
        self.channel: BackendChannel | None = None
        self._wanted = protocol
        self._sizes = list(queue_sizes)
        self._vrings = [Vring() for _ in queue_sizes]
        self._selected = 0
        self._status = 0
        self._config_seen = 0
        self._greet()

    def __enter__(self) -> VhostUserDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave and close everything; the memory stays the caller's."""
        self.client.close()
        if self.channel is not None:
            self.channel.close()
        if self.inflight is not None:
            os.close(self.inflight.fd)
        for vring in self._vrings:
            vring.close()

    def regions(self) -> list[Region]:
        """The guest's memory as the table has it."""
        return [Region(part.start, part.size, part.start + USER, part.fd) for part in self.memory.regions]

    def reconnect(self, client: Client, positions: Sequence[int]) -> None:
        """The server came back: start the same rings again where they are, and have them looked at.

        ``positions`` are those of SET_VRING_BASE. The old connection is closed.
        """
        self.client.close()
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        self.client = client
        self._greet()
        self._send_features()
        self._send_memory()
        running = [index for index, vring in enumerate(self._vrings) if vring.started]
        for index in running:
            self._start_vring(index, positions[index])
        if client.has(ProtocolFeature.STATUS):
            client.tell(Request.SET_STATUS, U64.pack(self._status))
        for index in running:
            os.eventfd_write(self._vrings[index].kick, 1)

    def stop_queue(self, index: int) -> int:
        """Stop a ring; its position."""
        self._vrings[index].started = False
        return self.client.get_vring_base(index)

    def wait(self, index: int, timeout: float = 10.0) -> bool:
        """Wait for an interrupt of a queue and take it; False after ``timeout`` seconds."""
        call = self._vrings[index].call
        if not ready([call], timeout):
            return False
        os.eventfd_read(call)
        return True

    def failed(self, index: int, timeout: float = 0.0) -> bool:
        """Whether the server signalled an error of a queue."""
        return bool(ready([self._vrings[index].err], timeout))

    # ---- see VirtioDriver --------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """The device status field; with STATUS in force the server's opinion of it."""
        if self.client.has(ProtocolFeature.STATUS):
            return self.client.ask_u64(Request.GET_STATUS)
        return self._status

    @status.setter
    def status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        new = value & ~self._status
        if new & _FEATURES_OK and not self._send_features():
            value &= ~_FEATURES_OK
        if new & _DRIVER_OK:
            self._send_memory()
            for index, vring in enumerate(self._vrings):
                if vring.ready:
                    self._start_vring(index)
        self._status |= value
        if self.client.has(ProtocolFeature.STATUS):
            self.client.tell(Request.SET_STATUS, U64.pack(self._status))

    def offered(self, words: int = 4) -> int:
        """The features the device offers, without those of the protocol."""
        return self.client.ask_u64(Request.GET_FEATURES) & ~_OWN_BITS

    def accept(self, features: int, words: int = 4) -> None:
        """What SET_FEATURES will say."""
        self.features = features

    def select_queue(self, index: int) -> None:
        """Only here: every message carries the number."""
        self._selected = index

    def queue_size_max(self, index: int) -> int:
        """What the caller said, as long as the server has that many queues."""
        self._selected = index
        if index >= len(self._sizes):
            return 0
        if self.client.has(ProtocolFeature.MQ) and index >= self.client.ask_u64(Request.GET_QUEUE_NUM):
            return 0
        return self._sizes[index]

    def place(self, size: int, desc: int, driver: int, device: int) -> None:
        """Remember size and addresses of the selected queue."""
        vring = self._vrings[self._selected]
        vring.size, vring.places = size, (desc, driver, device)

    def enable_queue(self) -> None:
        """Ready for DRIVER_OK, or started at once when that is past."""
        self._vrings[self._selected].ready = True
        if self._status & _DRIVER_OK:
            self._start_vring(self._selected)

    @property
    def queue_ready(self) -> int:
        """Whether the selected queue is enabled."""
        return int(self._vrings[self._selected].ready)

    def notify(self, index: int) -> None:
        """Signal the kick descriptor, asked for or not; nobody listens to one of no running ring."""
        if index < len(self._vrings) and self._vrings[index].started:
            os.eventfd_write(self._vrings[index].kick, 1)

    def reset_queue(self, index: int) -> None:
        """Stop one queue: a front-end resets it by that. What was noted in flight is void."""
        self.stop_queue(index)
        self._vrings[index].ready = False
        if self.inflight is not None:
            part = self.inflight.size // self.inflight.queues
            os.pwrite(self.inflight.fd, bytes(part), self.inflight.offset + index * part)

    def interrupt_status(self) -> int:
        """Bit 0: a call descriptor is signalled; bit 1: the configuration changed since this was read."""
        called = bool(ready([vring.call for vring in self._vrings]))
        changes = self.generation()
        changed, self._config_seen = changes != self._config_seen, changes
        return called | changed << 1

    def generation(self) -> int:
        """How many changes of the configuration the server told of."""
        return self.channel.poll() if self.channel is not None else 0

    def load_config(self, offset: int, size: int) -> int:
        """GET_CONFIG from the beginning, as every VMM asks: there are servers that ignore the offset.

        0 where the server has none.
        """
        try:
            return int.from_bytes(self.client.get_config(0, offset + size)[offset:], "little")
        except Refused:
            return 0

    def write_config(self, offset: int, size: int, value: int) -> None:
        """SET_CONFIG, which the server may refuse."""
        try:
            self.client.set_config(offset, value.to_bytes(size, "little"))
        except Refused:
            pass

    # ---- inside ------------------------------------------------------------------------------------

    def _greet(self) -> None:
        self.client.negotiate(self._wanted)
        if self.client.has(ProtocolFeature.BACKEND_REQ):
            self.channel = self.client.backend_channel()

    def _send_features(self) -> bool:
        """Whether the server takes them; what the protocol cannot say nobody takes."""
        if self.features >> 64 or self.features & _OWN_BITS:
            return False
        own = 1 << F_PROTOCOL_FEATURES if self.client.protocol else 0
        try:
            self.client.tell(Request.SET_FEATURES, U64.pack(self.features | own))
        except Refused:
            return False
        return True

    def _send_memory(self) -> None:
        self.client.set_mem_table(self.regions())
        if not self.client.has(ProtocolFeature.INFLIGHT_SHMFD):
            return
        if self.inflight is None:
            ready = [vring.size for vring in self._vrings if vring.ready]
            self.inflight = self.client.get_inflight(len(self._vrings), max(ready, default=1))
        self.client.set_inflight(self.inflight)

    def _start_vring(self, index: int, position: int | None = None) -> None:
        client, vring = self.client, self._vrings[index]
        packed = self.features >> _PACKED & 1
        desc, avail, used = (place + USER for place in vring.places)
        client.set_vring(Request.SET_VRING_NUM, index, vring.size)
        fresh = _FRESH_PACKED if packed else 0
        client.set_vring(Request.SET_VRING_BASE, index, fresh if position is None else position)
        client.set_vring_addr(index, desc, used, avail)
        client.set_vring_fd(Request.SET_VRING_CALL, index, vring.call)
        client.set_vring_fd(Request.SET_VRING_ERR, index, vring.err)
        client.set_vring_fd(Request.SET_VRING_KICK, index, vring.kick)
        if client.protocol:
            client.set_vring(Request.SET_VRING_ENABLE, index, 1)
        vring.started = True

    def _reset(self) -> None:
        """As a VMM does: every ring is stopped, then the device is reset as far as the protocol can."""
        for index, vring in enumerate(self._vrings):
            if vring.started:
                self.stop_queue(index)
            vring.ready = False
            for fd in (vring.kick, vring.call, vring.err):
                if ready([fd]):
                    os.eventfd_read(fd)
        if self.client.has(ProtocolFeature.STATUS):
            self.client.tell(Request.SET_STATUS, U64.pack(0))
        elif self.client.has(ProtocolFeature.RESET_DEVICE):
            self.client.tell(Request.RESET_DEVICE)
        if self.inflight is not None:
            os.close(self.inflight.fd)
            self.inflight = None
        self._status = 0


def ready(fds: Sequence[int], timeout: float = 0.0) -> list[int]:
    """Those that can be read within ``timeout`` seconds; a process may have thousands of descriptors."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout * 1000)]


def ring_position(ring: RingDriver) -> int:
    """Where a device that lost its memory goes on: the place of the next used element.

    For SET_VRING_BASE after a crash; everything offered from there on is taken anew, but what the
    in-flight buffer says is held.
    """
    place = ring.used_position
    return place | place << 16 if hasattr(ring, "device_event") else place
