"""The common configuration structure of virtio over PCI (virtio 1.4, 4.1.4.3).

Every field takes accesses of its own width at its own offset only, a 64-bit field those of its two
halves (4.1.3): anything else reads 0 and writes nothing, as does a field of the wrong direction.
"""

from __future__ import annotations

from collections.abc import Callable

from qvmcore.virtio import pci_spec, spec
from qvmcore.virtio.pci_vectors import Vectors
from qvmcore.virtio.state import VirtioState

_ALL = 0xFFFFFFFF


class CommonConfig:
    """The fields, as calls of the state machine. vCPU threads, several at a time.

    ``vectors`` keeps which event goes to which MSI-X vector.
    """

    def __init__(self, state: VirtioState, vectors: Vectors) -> None:
        self._state = state
        self._vectors = vectors
        self._device_word = 0
        self._driver_word = 0
        self._queue = 0
        self._reads = self._read_table()
        self._writes = self._write_table()

    def read(self, offset: int, size: int) -> int:
        """A field, 0 for anything that is none."""
        field = self._reads.get(offset)
        return field() if field is not None and pci_spec.COMMON_CFG_FIELDS[offset] == size else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A field; dropped when there is none to write."""
        field = self._writes.get(offset)
        if field is not None and pci_spec.COMMON_CFG_FIELDS[offset] == size:
            field(value)

    def reset(self) -> None:
        """Forget the selectors."""
        self._device_word = self._driver_word = self._queue = 0

    # ---- fields --------------------------------------------------------------------------------

    def _read_table(self) -> dict[int, Callable[[], int]]:
        state, vectors = self._state, self._vectors
        table: dict[int, Callable[[], int]] = {
            pci_spec.DEVICE_FEATURE_SELECT: lambda: self._device_word,
            pci_spec.DEVICE_FEATURE: lambda: state.device_features(self._device_word),
            pci_spec.DRIVER_FEATURE_SELECT: lambda: self._driver_word,
            pci_spec.DRIVER_FEATURE: lambda: state.driver_features(self._driver_word),
            pci_spec.CONFIG_MSIX_VECTOR: lambda: vectors.config,
            pci_spec.NUM_QUEUES: lambda: len(state.doorbells),
            pci_spec.DEVICE_STATUS: lambda: state.status,
            pci_spec.CONFIG_GENERATION: lambda: state.config.generation & 0xFF,
            pci_spec.QUEUE_SELECT: lambda: self._queue,
            pci_spec.QUEUE_SIZE: self._setup_field("size", 0),
            pci_spec.QUEUE_MSIX_VECTOR: lambda: vectors.of_queue(self._queue),
            pci_spec.QUEUE_ENABLE: self._setup_field("ready", 0),
            pci_spec.QUEUE_NOTIFY_OFF: lambda: self._queue if state.setup(self._queue) is not None else 0,
            pci_spec.QUEUE_RESET: lambda: int(state.queue_resetting(self._queue)),
        }
        for offset, name in _AREAS.items():
            table[offset] = self._setup_field(name, 0)
            table[offset + 4] = self._setup_field(name, 32)
        return table

    def _write_table(self) -> dict[int, Callable[[int], None]]:
        state, vectors = self._state, self._vectors
        table: dict[int, Callable[[int], None]] = {
            pci_spec.DEVICE_FEATURE_SELECT: self._select_device_word,
            pci_spec.DRIVER_FEATURE_SELECT: self._select_driver_word,
            pci_spec.DRIVER_FEATURE: lambda value: state.write_driver_features(self._driver_word, value),
            pci_spec.CONFIG_MSIX_VECTOR: vectors.map_config,
            pci_spec.DEVICE_STATUS: state.write_status,
            pci_spec.QUEUE_SELECT: self._select_queue,
            pci_spec.QUEUE_SIZE: self._write_size,
            pci_spec.QUEUE_MSIX_VECTOR: lambda value: vectors.map_queue(self._queue, value),
            pci_spec.QUEUE_ENABLE: self._write_enable,
            pci_spec.QUEUE_RESET: self._write_reset,
        }
        for offset, name in _AREAS.items():
            table[offset] = self._write_area(name, 0)
            table[offset + 4] = self._write_area(name, 32)
        return table

    def _setup_field(self, name: str, shift: int) -> Callable[[], int]:
        """Reads 32 bits of a parameter of the selected queue, 0 when there is no such queue."""

        def read() -> int:
            setup = self._state.setup(self._queue)
            return int(getattr(setup, name)) >> shift & _ALL if setup is not None else 0

        return read

    def _write_area(self, name: str, shift: int) -> Callable[[int], None]:
        """Writes 32 bits of an address, while the queue may be set up (4.1.4.3.2)."""
        keep = ~(_ALL << shift)

        def write(value: int) -> None:
            setup = self._state.setup(self._queue)
            if setup is not None and self._state.queue_configurable(self._queue):
                setattr(setup, name, getattr(setup, name) & keep | value << shift)

        return write

    def _write_size(self, value: int) -> None:
        """A size the queue cannot have is not taken: what is read back is always possible (4.1.4.3.1)."""
        state = self._state
        setup = state.setup(self._queue)
        if setup is None or not state.queue_configurable(self._queue) or not 0 < value <= setup.size_max:
            return
        if value & (value - 1) and not state.features >> spec.VIRTIO_F_RING_PACKED & 1:
            return
        setup.size = value

    def _write_enable(self, value: int) -> None:
        """A driver must not write 0 (4.1.4.3.2): a queue stops by queue_reset or a reset."""
        if value == 1:
            self._state.write_queue_ready(self._queue, 1)

    def _write_reset(self, value: int) -> None:
        """Without RING_RESET the field does not exist; the state machine knows."""
        if value == 1:
            self._state.reset_queue(self._queue)

    def _select_device_word(self, value: int) -> None:
        self._device_word = value

    def _select_driver_word(self, value: int) -> None:
        self._driver_word = value

    def _select_queue(self, value: int) -> None:
        self._queue = value


_AREAS = {
    pci_spec.QUEUE_DESC: "desc",
    pci_spec.QUEUE_DRIVER: "driver",
    pci_spec.QUEUE_DEVICE: "device",
}
