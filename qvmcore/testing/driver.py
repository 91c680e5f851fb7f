"""A guest's virtio driver over MMIO: discovery, negotiation, queues (virtio 1.4, 3.1.1 and 4.2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qvmcore.memory import GuestMemory
from qvmcore.testing.ring import GuestRam, Piece, Request, SplitDriver, Used
from qvmcore.virtio import spec

__all__ = ["Bus", "FeaturesRefused", "GuestRam", "MmioDriver", "Piece", "Request", "SplitDriver", "Used"]

#: What a driver accepts of the features that belong to the ring.
RING_FEATURES = 1 << spec.VIRTIO_F_VERSION_1 | 1 << spec.VIRTIO_F_EVENT_IDX | 1 << spec.VIRTIO_F_INDIRECT_DESC


class Bus(Protocol):
    """Anything a guest can load from and store to, e.g. an AddressSpace."""

    def read(self, address: int, size: int) -> int:
        """A load of ``size`` bytes."""

    def write(self, address: int, size: int, value: int) -> None:
        """A store of ``size`` bytes."""


class FeaturesRefused(Exception):
    """The device did not keep FEATURES_OK."""


class MmioDriver:
    """The driver of one virtio-mmio device at ``base``; ``queues`` are its rings after :meth:`start`.

    ::

        driver = MmioDriver(device.bus, device.base, GuestRam(device.memory))
        driver.start()
        request = driver.queues[0].submit([header], [512, 1])
    """

    def __init__(self, bus: Bus, base: int, ram: GuestRam) -> None:
        self._bus = bus
        self._base = base
        self.ram = ram
        self.features = 0
        self.queues: list[SplitDriver] = []

    @classmethod
    def of(cls, device: _Plugged) -> MmioDriver:
        """A driver for a device from :func:`qvmcore.testing.fakes.plug`."""
        return cls(device.bus, device.base, GuestRam(device.memory))

    # ---- the checklist of 3.1.1 ----------------------------------------------------------------

    def start(self, wanted: int | None = None, sizes: Sequence[int | None] | None = None) -> None:
        """Bring the device up: reset, negotiate, set every queue up, DRIVER_OK.

        ``wanted`` are the features to accept if offered (all if None), ``sizes`` the queue sizes
        (None: the largest). FeaturesRefused when the device declines.
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
        self.accept(offered if wanted is None else offered & wanted)
        self.status = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK
        if not self.status & spec.FEATURES_OK:
            raise FeaturesRefused(f"features {self.features:#x}, offered {offered:#x}")
        return self.features

    def setup_queues(self, sizes: Sequence[int | None] | None = None) -> None:
        """Step 7: every queue the device has, in order."""
        index = 0
        while largest := self.queue_size_max(index):
            size = sizes[index] if sizes is not None and index < len(sizes) else None
            self.queues.append(self.setup_queue(index, size or largest))
            index += 1

    def setup_queue(self, index: int, size: int) -> SplitDriver:
        """4.2.3.2 for one queue."""
        ring = SplitDriver(self.ram, size, self.features, lambda: self.notify(index))
        self.write(spec.MMIO_QUEUE_SEL, index)
        assert self.read(spec.MMIO_QUEUE_READY) == 0, f"queue {index} is in use"
        self.place(size, ring.desc, ring.avail, ring.used)
        self.write(spec.MMIO_QUEUE_READY, 1)
        return ring

    def driver_ok(self) -> None:
        """Step 8."""
        self.status = self.status | spec.DRIVER_OK

    # ---- single registers ----------------------------------------------------------------------

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

    @property
    def needs_reset(self) -> bool:
        """Whether the device reports DEVICE_NEEDS_RESET."""
        return bool(self.status & spec.DEVICE_NEEDS_RESET)

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

    def queue_size_max(self, index: int) -> int:
        """QueueSizeMax of a queue; 0 when there is none."""
        self.write(spec.MMIO_QUEUE_SEL, index)
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

    def notify(self, index: int) -> None:
        """Notify a queue, asked for or not."""
        self.write(spec.MMIO_QUEUE_NOTIFY, index)

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

    def config(self, offset: int, size: int) -> int:
        """A field of 1, 2, 4 or 8 bytes; the last in two loads, repeated until consistent (2.5.1)."""
        if size <= 4:
            return self._bus.read(self._base + spec.MMIO_CONFIG + offset, size)
        while True:
            before = self.generation()
            value = self.config(offset, 4) | self.config(offset + 4, 4) << 32
            if self.generation() == before:
                return value

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
