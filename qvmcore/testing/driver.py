"""A guest's virtio driver: negotiation and queues on any transport, registers on MMIO (virtio 1.4, 3.1.1)."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol

from qvmcore.memory import GuestMemory
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, Piece, Request, RingDriver, SplitDriver, Used
from qvmcore.virtio import spec

__all__ = [
    "Bus",
    "FeaturesRefused",
    "GuestRam",
    "MmioDriver",
    "PackedDriver",
    "Piece",
    "Request",
    "RingDriver",
    "SplitDriver",
    "Used",
    "VirtioDriver",
]

#: What a driver accepts of the features that belong to the ring.
RING_FEATURES = sum(
    1 << bit
    for bit in (
        spec.VIRTIO_F_VERSION_1,
        spec.VIRTIO_F_INDIRECT_DESC,
        spec.VIRTIO_F_EVENT_IDX,
        spec.VIRTIO_F_RING_PACKED,
        spec.VIRTIO_F_IN_ORDER,
        spec.VIRTIO_F_NOTIFICATION_DATA,
        spec.VIRTIO_F_RING_RESET,
    )
)


class Bus(Protocol):
    """Anything a guest can load from and store to, e.g. an AddressSpace."""

    def read(self, address: int, size: int) -> int:
        """A load of ``size`` bytes."""

    def write(self, address: int, size: int, value: int) -> None:
        """A store of ``size`` bytes."""


class FeaturesRefused(Exception):
    """The device did not keep FEATURES_OK."""


class VirtioDriver(abc.ABC):
    """The driver of one virtio device; ``queues`` are its rings after :meth:`start`.

    ::

        driver = device.driver()
        driver.start()
        request = driver.queues[0].submit([header], [512, 1])
    """

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram
        self.features = 0
        self.queues: list[RingDriver] = []
        #: Whether to accept packed rings when all that is offered is accepted.
        self.packed = False

    # ---- the checklist of 3.1.1 ----------------------------------------------------------------

    def start(self, wanted: int | None = None, sizes: Sequence[int | None] | None = None) -> None:
        """Bring the device up: reset, negotiate, set every queue up, DRIVER_OK.

        ``wanted`` are the features to accept if offered; None accepts all, RING_PACKED only with
        ``packed`` set. ``sizes`` are the queue sizes (None: the largest). FeaturesRefused when the
        device declines.
        """
        self.reset()
        self.negotiate(wanted)
        self.setup_queues(sizes)
        self.driver_ok()

    def reset(self) -> None:
        """Step 1, and check that the device says it is reset."""
        self.status = 0
        assert self.status == 0, f"the status after a reset is {self.status:#x}"
        self.queues = []

    def negotiate(self, wanted: int | None = None) -> int:
        """Steps 2 to 6; the features agreed upon."""
        self.status = spec.ACKNOWLEDGE
        self.status = spec.ACKNOWLEDGE | spec.DRIVER
        offered = self.offered()
        self.accept(offered & (self.acceptable() if wanted is None else wanted))
        self.status = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK
        if not self.status & spec.FEATURES_OK:
            raise FeaturesRefused(f"features {self.features:#x}, offered {offered:#x}")
        return self.features

    def acceptable(self) -> int:
        """Everything offered; RING_PACKED only with ``packed`` set."""
        return self.offered() & ~((not self.packed) << spec.VIRTIO_F_RING_PACKED)

    def setup_queues(self, sizes: Sequence[int | None] | None = None) -> None:
        """Step 7: every queue the device has, in order."""
        index = 0
        while largest := self.queue_size_max(index):
            size = sizes[index] if sizes is not None and index < len(sizes) else None
            self.queues.append(self.setup_queue(index, size or largest))
            index += 1

    def setup_queue(self, index: int, size: int) -> RingDriver:
        """One queue: its ring in guest memory, told to the device."""
        kind = PackedDriver if self.features >> spec.VIRTIO_F_RING_PACKED & 1 else SplitDriver
        ring: RingDriver = kind(self.ram, size, self.features, lambda: self.notify(index))
        self.select_queue(index)
        assert not self.queue_ready, f"queue {index} is in use"
        self.place(size, ring.desc, ring.avail, ring.used)
        self.enable_queue()
        return ring

    def notification(self, index: int) -> int:
        """What to write to notify a queue: with NOTIFICATION_DATA, its ring's position too (2.9)."""
        if self.features >> spec.VIRTIO_F_NOTIFICATION_DATA & 1 and index < len(self.queues):
            return self.queues[index].position << 16 | index
        return index

    def driver_ok(self) -> None:
        """Step 8."""
        self.status = self.status | spec.DRIVER_OK

    @property
    def needs_reset(self) -> bool:
        """Whether the device reports DEVICE_NEEDS_RESET."""
        return bool(self.status & spec.DEVICE_NEEDS_RESET)

    def config(self, offset: int, size: int) -> int:
        """A field of 1, 2, 4 or 8 bytes; the last in two loads, repeated until consistent (2.5.1)."""
        if size <= 4:
            return self.load_config(offset, size)
        while True:
            before = self.generation()
            value = self.load_config(offset, 4) | self.load_config(offset + 4, 4) << 32
            if self.generation() == before:
                return value

    # ---- the transport's registers ---------------------------------------------------------------

    @property
    @abc.abstractmethod
    def status(self) -> int:
        """The device status field."""

    @status.setter
    @abc.abstractmethod
    def status(self, value: int) -> None: ...

    @abc.abstractmethod
    def offered(self, words: int = 4) -> int:
        """The features the device offers, of ``32 * words`` bits."""

    @abc.abstractmethod
    def accept(self, features: int, words: int = 4) -> None:
        """Write the features the driver accepts."""

    @abc.abstractmethod
    def select_queue(self, index: int) -> None:
        """The queue the following calls are about."""

    @abc.abstractmethod
    def queue_size_max(self, index: int) -> int:
        """Select a queue; its largest size, 0 when there is none."""

    @abc.abstractmethod
    def place(self, size: int, desc: int, driver: int, device: int) -> None:
        """Write size and addresses of the selected queue."""

    @abc.abstractmethod
    def enable_queue(self) -> None:
        """Enable the selected queue."""

    @property
    @abc.abstractmethod
    def queue_ready(self) -> int:
        """Whether the selected queue is enabled."""

    @abc.abstractmethod
    def notify(self, index: int) -> None:
        """Notify a queue, asked for or not."""

    @abc.abstractmethod
    def reset_queue(self, index: int) -> None:
        """Reset one queue (2.6.1) and check that it is reset; :meth:`setup_queue` sets it up again."""

    @abc.abstractmethod
    def interrupt_status(self) -> int:
        """What is pending: bit 0 used buffers, bit 1 configuration. PCI clears it by this."""

    @abc.abstractmethod
    def generation(self) -> int:
        """The configuration generation."""

    @abc.abstractmethod
    def load_config(self, offset: int, size: int) -> int:
        """One load from the configuration."""

    @abc.abstractmethod
    def write_config(self, offset: int, size: int, value: int) -> None:
        """Store to a field of the configuration."""


class MmioDriver(VirtioDriver):
    """The driver of one virtio-mmio device at ``base`` (4.2.3).

    ::

        driver = MmioDriver(device.bus, device.base, GuestRam(device.memory))
    """

    def __init__(self, bus: Bus, base: int, ram: GuestRam) -> None:
        super().__init__(ram)
        self._bus = bus
        self._base = base

    @classmethod
    def of(cls, device: _Plugged) -> MmioDriver:
        """A driver for a device from :func:`qvmcore.testing.fakes.plug`."""
        return cls(device.bus, device.base, GuestRam(device.memory))

    def read(self, register: int) -> int:
        """Load a control register."""
        return self._bus.read(self._base + register, 4)

    def write(self, register: int, value: int) -> None:
        """Store to a control register."""
        self._bus.write(self._base + register, 4, value & 0xFFFFFFFF)

    @property
    def status(self) -> int:
        """The device status field."""
        return self.read(spec.MMIO_STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self.write(spec.MMIO_STATUS, value)

    def offered(self, words: int = 4) -> int:
        """The features the device offers, of ``32 * words`` bits."""
        bits = 0
        for word in range(words):
            self.write(spec.MMIO_DEVICE_FEATURES_SEL, word)
            bits |= self.read(spec.MMIO_DEVICE_FEATURES) << 32 * word
        return bits

    def accept(self, features: int, words: int = 4) -> None:
        """Write the features the driver accepts."""
        self.features = features
        for word in range(words):
            self.write(spec.MMIO_DRIVER_FEATURES_SEL, word)
            self.write(spec.MMIO_DRIVER_FEATURES, features >> 32 * word & 0xFFFFFFFF)

    def select_queue(self, index: int) -> None:
        """QueueSel."""
        self.write(spec.MMIO_QUEUE_SEL, index)

    def queue_size_max(self, index: int) -> int:
        """QueueSizeMax of a queue; 0 when there is none."""
        self.select_queue(index)
        return self.read(spec.MMIO_QUEUE_SIZE_MAX)

    def place(self, size: int, desc: int, driver: int, device: int) -> None:
        """Write size and addresses of the selected queue."""
        self.write(spec.MMIO_QUEUE_SIZE, size)
        for low, address in (
            (spec.MMIO_QUEUE_DESC_LOW, desc),
            (spec.MMIO_QUEUE_DRIVER_LOW, driver),
            (spec.MMIO_QUEUE_DEVICE_LOW, device),
        ):
            self.write(low, address & 0xFFFFFFFF)
            self.write(low + 4, address >> 32)

    def enable_queue(self) -> None:
        """QueueReady 1."""
        self.write(spec.MMIO_QUEUE_READY, 1)

    @property
    def queue_ready(self) -> int:
        """QueueReady."""
        return self.read(spec.MMIO_QUEUE_READY)

    def notify(self, index: int) -> None:
        """Notify a queue, asked for or not (4.2.3.3)."""
        self.write(spec.MMIO_QUEUE_NOTIFY, self.notification(index))

    def reset_queue(self, index: int) -> None:
        """Reset one queue (2.6.1) and check that it is reset; :meth:`setup_queue` sets it up again."""
        self.write(spec.MMIO_QUEUE_SEL, index)
        self.write(spec.MMIO_QUEUE_RESET, 1)
        assert self.read(spec.MMIO_QUEUE_RESET) == 0, f"the reset of queue {index} does not end"
        assert self.read(spec.MMIO_QUEUE_READY) == 0, f"queue {index} is ready after its reset"

    def interrupt_status(self) -> int:
        """InterruptStatus."""
        return self.read(spec.MMIO_INTERRUPT_STATUS)

    def ack(self, bits: int | None = None) -> int:
        """Acknowledge interrupts, all that are pending by default; what was acknowledged."""
        pending = self.interrupt_status() if bits is None else bits
        self.write(spec.MMIO_INTERRUPT_ACK, pending)
        return pending

    def generation(self) -> int:
        """ConfigGeneration."""
        return self.read(spec.MMIO_CONFIG_GENERATION)

    def load_config(self, offset: int, size: int) -> int:
        """One load from the configuration."""
        return self._bus.read(self._base + spec.MMIO_CONFIG + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Store to a field of the configuration."""
        self._bus.write(self._base + spec.MMIO_CONFIG + offset, size, value)


class _Plugged(Protocol):
    """The part of :class:`qvmcore.testing.fakes.Plugged` a driver needs."""

    @property
    def bus(self) -> Bus: ...
    @property
    def base(self) -> int: ...
    @property
    def memory(self) -> GuestMemory: ...
