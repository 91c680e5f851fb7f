"""virtio over MMIO, version 2 (virtio 1.4, 4.2): registers in, one level-triggered interrupt out.

Control registers take 32-bit aligned accesses only (4.2.2.2): anything else reads 0 and writes
nothing, as does a register of the wrong direction. The configuration space, from 0x100, takes
accesses of 1, 2 and 4 bytes at any offset (4.2.2: byte alignment).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from qvmcore.errors import PluginError
from qvmcore.irq import IrqLine
from qvmcore.types import Doorbell, MmioHandler
from qvmcore.virtio import spec
from qvmcore.virtio.device import VirtioVdev

_ALL = 0xFFFFFFFF


class MmioTransport:
    """Connects a virtio device to its register window and to its interrupt line.

    Made once, at freeze, before the guest starts; :meth:`read` and :meth:`write` run on vCPU
    threads, several at a time. The line is high while InterruptStatus is not zero (4.2.3.4).
    ``fast_doorbells``: the engine signals the eventfds of the doorbells by itself.
    """

    def __init__(self, vdev: VirtioVdev, *, fast_doorbells: bool = False) -> None:
        room = vdev.windows[0].size - spec.MMIO_CONFIG
        if len(vdev.config_space()) > room:
            raise PluginError(f"{vdev.vdev_type}: config_space() exceeds the {room} bytes of its window")
        self._vdev = vdev
        self._state = vdev.virtio
        self._config = vdev.virtio.config
        self._device_word = 0
        self._driver_word = 0
        self._queue = 0
        self._interrupts = 0
        self._interrupt_lock = threading.Lock()
        self._line: IrqLine | None = None
        self._reads = self._read_table()
        self._writes = self._write_table()
        # QueueNotify has 32 bits, so it can carry the position too (4.2.3.3); but then its value is not
        # the queue's number alone, by which a fast doorbell is told from the others.
        features = 0 if fast_doorbells else 1 << spec.VIRTIO_F_NOTIFICATION_DATA
        self._state.attach(self, features, fast_doorbells=fast_doorbells)

    def handler(self) -> MmioHandler:
        """What the window is bound to; its doorbells are the values of QueueNotify."""
        doorbells = (
            (Doorbell(spec.MMIO_QUEUE_NOTIFY, 4, index), event.fd)
            for index, event in enumerate(self._state.doorbells)
        )
        return MmioHandler(self.read, self.write, tuple(doorbells))

    def read(self, offset: int, size: int) -> int:
        """A register or a piece of the configuration."""
        if offset >= spec.MMIO_CONFIG:
            return self._config.read(offset - spec.MMIO_CONFIG, size)
        register = self._reads.get(offset)
        return register() if register is not None and size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A register or a piece of the configuration."""
        if offset >= spec.MMIO_CONFIG:
            self._state.write_config(offset - spec.MMIO_CONFIG, size, value)
            return
        register = self._writes.get(offset)
        if register is not None and size == 4:
            register(value)

    # ---- Transport: called by the state machine, any thread ----------------------------------

    def interrupt_queue(self, index: int) -> None:
        """A used buffer notification: one bit for all queues (4.2.2)."""
        self._raise(spec.MMIO_INT_VRING)

    def interrupt_config(self) -> None:
        """A configuration change notification."""
        self._raise(spec.MMIO_INT_CONFIG)

    def reset(self) -> None:
        """Reset clears InterruptStatus (4.2.2.1) and the selectors."""
        self._device_word = self._driver_word = self._queue = 0
        self._acknowledge(_ALL)

    # ---- registers -----------------------------------------------------------------------------

    def _raise(self, bit: int) -> None:
        with self._interrupt_lock:
            self._interrupts |= bit
            if self._line is None:
                # Lines are bound at freeze, perhaps after this transport was made.
                self._line = self._vdev.ctx.irq(0)
            self._line.set(True)

    def _acknowledge(self, value: int) -> None:
        with self._interrupt_lock:
            self._interrupts &= ~value
            if not self._interrupts and self._line is not None:
                self._line.set(False)

    def _read_table(self) -> dict[int, Callable[[], int]]:
        state, vdev = self._state, self._vdev
        table: dict[int, Callable[[], int]] = {
            spec.MMIO_MAGIC_VALUE: lambda: spec.MMIO_MAGIC,
            spec.MMIO_VERSION: lambda: spec.MMIO_VERSION_2,
            spec.MMIO_DEVICE_ID: lambda: vdev.device_id,
            spec.MMIO_VENDOR_ID: lambda: vdev.vendor_id,
            spec.MMIO_DEVICE_FEATURES: lambda: state.device_features(self._device_word),
            spec.MMIO_QUEUE_SIZE_MAX: self._queue_size_max,
            spec.MMIO_QUEUE_READY: self._queue_ready,
            spec.MMIO_INTERRUPT_STATUS: lambda: self._interrupts,
            spec.MMIO_STATUS: lambda: state.status,
            spec.MMIO_QUEUE_RESET: lambda: int(state.queue_resetting(self._queue)),
            spec.MMIO_CONFIG_GENERATION: lambda: state.config.generation & _ALL,
        }
        # No shared memory region exists: length -1 and base all ones (4.2.2, SHMLenLow).
        for register in (
            spec.MMIO_SHM_LEN_LOW,
            spec.MMIO_SHM_LEN_HIGH,
            spec.MMIO_SHM_BASE_LOW,
            spec.MMIO_SHM_BASE_HIGH,
        ):
            table[register] = lambda: _ALL
        return table

    def _write_table(self) -> dict[int, Callable[[int], None]]:
        state = self._state
        return {
            spec.MMIO_DEVICE_FEATURES_SEL: self._select_device_word,
            spec.MMIO_DRIVER_FEATURES: lambda value: state.write_driver_features(self._driver_word, value),
            spec.MMIO_DRIVER_FEATURES_SEL: self._select_driver_word,
            spec.MMIO_QUEUE_SEL: self._select_queue,
            spec.MMIO_QUEUE_SIZE: self._queue_field("size", 0),
            spec.MMIO_QUEUE_READY: lambda value: state.write_queue_ready(self._queue, value),
            spec.MMIO_QUEUE_NOTIFY: state.notify,
            spec.MMIO_QUEUE_RESET: self._queue_reset,
            spec.MMIO_INTERRUPT_ACK: self._acknowledge,
            spec.MMIO_STATUS: state.write_status,
            spec.MMIO_QUEUE_DESC_LOW: self._queue_field("desc", 0),
            spec.MMIO_QUEUE_DESC_HIGH: self._queue_field("desc", 32),
            spec.MMIO_QUEUE_DRIVER_LOW: self._queue_field("driver", 0),
            spec.MMIO_QUEUE_DRIVER_HIGH: self._queue_field("driver", 32),
            spec.MMIO_QUEUE_DEVICE_LOW: self._queue_field("device", 0),
            spec.MMIO_QUEUE_DEVICE_HIGH: self._queue_field("device", 32),
        }

    def _queue_field(self, name: str, shift: int) -> Callable[[int], None]:
        """Writes 32 bits of a queue parameter, while the queue may be set up (4.2.2.2, 2.6.1.2)."""
        keep = ~(_ALL << shift)

        def write(value: int) -> None:
            setup = self._state.setup(self._queue)
            if setup is not None and self._state.queue_configurable(self._queue):
                setattr(setup, name, getattr(setup, name) & keep | value << shift)

        return write

    def _queue_size_max(self) -> int:
        setup = self._state.setup(self._queue)
        return setup.size_max if setup is not None else 0

    def _queue_ready(self) -> int:
        setup = self._state.setup(self._queue)
        return int(setup.ready) if setup is not None else 0

    def _queue_reset(self, value: int) -> None:
        if value == 1:
            self._state.reset_queue(self._queue)

    def _select_device_word(self, value: int) -> None:
        self._device_word = value

    def _select_driver_word(self, value: int) -> None:
        self._driver_word = value

    def _select_queue(self, value: int) -> None:
        self._queue = value
