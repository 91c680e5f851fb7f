"""The registers of a virtio device as a driver on a bus writes them (virtio 1.4, 2.1, 2.2, 2.5, 3.1).

A transport turns its accesses into these calls, on any vCPU thread. Features are integers of any width,
seen 32 bits at a time.
"""

from __future__ import annotations

from functools import partial

from qvmcore.errors import GuestError
from qvmcore.virtio import spec
from qvmcore.virtio.life import WELCOME, DeviceLife

#: 32-bit feature words a driver may select; the standard allots bits up to 127 (2.2).
FEATURE_WORDS = 32

_DRIVER_BITS = spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK | spec.FEATURES_OK | spec.FAILED


class DriverRegisters(DeviceLife):
    """The driver's side of a device's life, register by register."""

    def device_features(self, word: int) -> int:
        """Offered feature bits ``32 * word`` to ``32 * word + 31``; 0 beyond the last."""
        return self.offered >> 32 * word & 0xFFFFFFFF if word < FEATURE_WORDS else 0

    def driver_features(self, word: int) -> int:
        """What the driver accepted of these 32 bits so far; 0 beyond the last word."""
        return self._driver_features >> 32 * word & 0xFFFFFFFF if word < FEATURE_WORDS else 0

    def write_driver_features(self, word: int, value: int) -> None:
        """The driver accepts these 32 bits. Without effect after FEATURES_OK, which took a copy (2.2)."""
        with self._control:
            if word >= FEATURE_WORDS:
                # Nothing is offered up there; remembered, not stored: the word number is the guest's.
                self._beyond = self._beyond or value != 0
                return
            shift = 32 * word
            self._driver_features = self._driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def write_status(self, value: int) -> None:
        """The driver wrote the device status; 0 resets (2.4). Bits are never cleared otherwise (2.1.1)."""
        with self._control:
            if value == 0:
                self.reset()
                return
            if self._ended:
                return
            new = value & _DRIVER_BITS & ~self._status
            with self._lock:
                self._status |= new & (WELCOME | spec.FAILED)
                if new & spec.FAILED:
                    self._kill_queues()
            if new & spec.FEATURES_OK:
                reason = self._accept_features()
                if reason:
                    self._vdev.ctx.log.debug("FEATURES_OK refused: %s", reason)
            if new & spec.DRIVER_OK and not self._status & (spec.DEVICE_NEEDS_RESET | spec.FAILED):
                self._activate()

    @property
    def configurable(self) -> bool:
        """Whether queues may be set up: between FEATURES_OK and DRIVER_OK (3.1.1 step 7)."""
        return self._status & (spec.FEATURES_OK | spec.DRIVER_OK | spec.FAILED) == spec.FEATURES_OK

    def queue_configurable(self, index: int) -> bool:
        """Whether the driver may set this queue up: during set-up, or after a reset of it (2.6.1.2)."""
        setup = self.setup(index)
        if setup is None or setup.ready:
            return False
        return self.configurable or (setup.reopened and self.active)

    def queue_resetting(self, index: int) -> bool:
        """What the driver reads while it waits for a reset of one queue (4.1.4.3.1, 4.2.2.1)."""
        setup = self.setup(index)
        return setup is not None and setup.resetting

    def write_queue_ready(self, index: int, value: int) -> None:
        """1 checks and enables a queue during set-up or after its reset, 0 stops it and waits for it.

        An unusable queue stays at 0 and puts the device into DEVICE_NEEDS_RESET.
        """
        with self._control:
            setup = self.setup(index)
            if setup is None:
                return
            if value & 1:
                if self.queue_configurable(index):
                    try:
                        setup.enable(self._vdev.ctx.memory, self._features)
                    except GuestError as error:
                        self.needs_reset(type(error)(f"queue {index}: {error}"))
                        return
                    if self._activated:
                        self._make_queue(index, setup)
                        self._serve_queue(index)
                return
            queue = self._queues[index]
            if queue is not None and setup.ready:
                queue.kill()
                if not self._quiesce(lambda: None):
                    return
            setup.ready = False

    def reset_queue(self, index: int) -> None:
        """The driver resets one queue (2.6.1); waits for the worker, bounded. Others go on.

        The queue is then as before its set-up, and may be set up again. Without RING_RESET, or for a
        number without a queue, nothing happens. When the worker does not come, the reset never
        completes and the device is lost, as with :meth:`reset`.
        """
        with self._control:
            setup = self.setup(index)
            negotiated = self._features >> spec.VIRTIO_F_RING_RESET & 1
            if setup is None or not negotiated or self._hung or self._ended:
                return
            setup.resetting = True
            queue = self._queues[index]
            if queue is not None:
                queue.kill()
                if not self._quiesce(partial(self._vdev.on_queue_reset, index)):
                    return
                with self._lock:
                    self._queues[index] = None
            setup.reset()
            setup.reopened = self._activated

    def notify(self, value: int) -> None:
        """The driver notified: ``value`` is what it wrote, the number of a queue and, with
        NOTIFICATION_DATA, the position it filled the ring up to in the upper 16 bits (2.9).

        A number without a queue, or before DRIVER_OK: ignored (2.1.2).
        """
        if self._features >> spec.VIRTIO_F_NOTIFICATION_DATA & 1:
            position, value = value >> 16, value & 0xFFFF
            queue = self._queues[value] if value < len(self._queues) else None
            if queue is not None and queue.reached(position):
                # The worker took it while it was busy with what came before: no need to wake it.
                return
        self.notify_queue(value)

    def notify_queue(self, index: int) -> None:
        """As :meth:`notify`, for a notification without a position."""
        if not self._activated or index >= len(self._doorbells):
            return
        at_once = self._at_once.get(index)
        if at_once is None or not at_once():
            self._doorbells[index].signal()

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver writes the device configuration; dropped unless wholly inside it."""
        with self._control:
            if offset + size > self.config.length or self._ended:
                return
            self._touched = True
            self._vdev.config_write(offset, value.to_bytes(size, "little"))
            self.config.refresh()

    # ---- inside ----------------------------------------------------------------------------

    def _activate(self) -> None:
        if not self._status & spec.FEATURES_OK or self._activated:
            return
        for index, setup in enumerate(self._setups):
            if setup.ready:
                self._make_queue(index, setup)
        self._driver_ok()
        for index, queue in enumerate(self._queues):
            if queue is not None:
                self._serve_queue(index)
