"""A guest's virtio driver over PCI: capabilities, BARs, MSI-X (virtio 1.4, 4.1.5)."""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

from qvmcore.pci import spec as pci
from qvmcore.testing.driver import Bus, GuestRam, VirtioDriver
from qvmcore.virtio import pci_spec, spec

#: Most capabilities a chain can have in 192 bytes behind the header.
_CHAIN_MAX = 48


class Config(Protocol):
    """Configuration space of one function, as a guest reaches it."""

    def config_read(self, offset: int, size: int) -> int:
        """A load of ``size`` bytes."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A store of ``size`` bytes."""


class Structure(NamedTuple):
    """A virtio structure capability (4.1.4): where it is in configuration space and what it says.

    ``extra`` are the bytes behind struct virtio_pci_cap.
    """

    at: int
    cfg_type: int
    bar: int
    offset: int
    length: int
    extra: bytes


class PciDevice:
    """What firmware and an operating system do with a function before a driver sees it.

    ``bars`` are the BARs found by sizing, number to (address, size); :meth:`enumerate` places those
    without an address from ``aperture`` on.
    """

    def __init__(self, config: Config, aperture: int = 0x1000_0000) -> None:
        self.config = config
        self.bars: dict[int, tuple[int, int]] = {}
        self._aperture = aperture

    def read(self, offset: int, size: int = 4) -> int:
        """A load from configuration space."""
        return self.config.config_read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """A store to configuration space."""
        self.config.config_write(offset, size, value)

    def enumerate(self, *, anew: bool = False) -> None:
        """Size and place the BARs, then let the function decode memory and master the bus.

        A BAR that has an address keeps it, unless ``anew``.
        """
        self.bars = {}
        self.write(pci.COMMAND, 0, 2)
        number, free = 0, self._aperture
        while number < pci.BAR_COUNT:
            at = pci.BAR0 + 4 * number
            wide = bool(self.read(at) & pci.BAR_64BIT)
            before = self._bar(at, wide)
            self._set_bar(at, wide, (1 << 64) - 1)
            size = -self._bar(at, wide) & (1 << (64 if wide else 32)) - 1
            if size:
                address = 0 if anew else before
                address = address or -(-free // size) * size
                free = max(free, address + size)
                self._set_bar(at, wide, address)
                self.bars[number] = (address, size)
            number += 1 + wide
        self.write(pci.COMMAND, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER, 2)

    def capabilities(self) -> list[tuple[int, int]]:
        """(offset, ID) of each capability in the order of the chain. AssertionError for a loop."""
        found = []
        if self.read(pci.STATUS, 2) & pci.STATUS_CAPABILITIES:
            at = self.read(pci.CAPABILITIES_POINTER, 1) & ~3
            while at:
                found.append((at, self.read(at, 1)))
                assert len(found) <= _CHAIN_MAX, "the capability chain has a loop"
                at = self.read(at + 1, 1) & ~3
        return found

    def structures(self) -> list[Structure]:
        """The virtio structures in the order of preference (4.1.4)."""
        found = []
        for at, kind in self.capabilities():
            if kind != pci.CAP_VENDOR:
                continue
            length = self.read(at + 2, 1)
            assert length >= pci_spec.CAP_SIZE, f"the capability at {at:#x} claims {length} bytes"
            head = b"".join(self.read(at + 4 * n).to_bytes(4, "little") for n in range(4))
            cfg_type, bar, where, size = struct.unpack("<xxxBBxxxII", head)
            # A load from pci_cfg_data would be an access to a BAR.
            more = range(pci_spec.CAP_SIZE, length if cfg_type != pci_spec.CAP_PCI_CFG else 0)
            extra = bytes(self.read(at + n, 1) for n in more)
            found.append(Structure(at, cfg_type, bar, where, size, extra))
        return found

    def _bar(self, at: int, wide: bool) -> int:
        low = self.read(at) & ~pci.BAR_FLAGS
        return low | self.read(at + 4) << 32 if wide else low

    def _set_bar(self, at: int, wide: bool, value: int) -> None:
        self.write(at, value & 0xFFFFFFFF)
        if wide:
            self.write(at + 4, value >> 32)


class PciDriver(VirtioDriver):
    """The driver of one virtio-pci function.

    ``device`` is its configuration space, ``bus`` where its BARs decode. ``msix`` vectors are
    set up by :meth:`use_msix`; without it the driver uses INTx and the ISR status.
    """

    def __init__(self, bus: Bus, device: PciDevice, ram: GuestRam) -> None:
        super().__init__(ram)
        self._bus = bus
        self.device = device
        if not device.bars:
            device.enumerate()
        self.found = {each.cfg_type: each for each in reversed(device.structures())}
        self.multiplier = int.from_bytes(self.found[pci_spec.CAP_NOTIFY_CFG].extra[:4], "little")
        self._common = self._address(pci_spec.CAP_COMMON_CFG)
        self._isr = self._address(pci_spec.CAP_ISR_CFG)
        self._notify = self._address(pci_spec.CAP_NOTIFY_CFG)
        self._config = (
            self._address(pci_spec.CAP_DEVICE_CFG) if pci_spec.CAP_DEVICE_CFG in self.found else None
        )
        self._offsets: dict[int, int] = {}

    # ---- MSI-X (4.1.5.1.2) -----------------------------------------------------------------------

    @property
    def vectors(self) -> int:
        """Entries of the MSI-X table."""
        return (self.device.read(self._msix() + 2, 2) & 0x7FF) + 1

    def use_msix(self, address: int, *, first: int = 0) -> None:
        """Unmask every vector, vector n as the message ``first + n`` to ``address``, and enable MSI-X."""
        at = self._msix()
        table = self.device.read(at + 4)
        base = self.device.bars[table & 7][0] + (table & ~7)
        for vector in range(self.vectors):
            entry = base + pci.MSIX_ENTRY_SIZE * vector
            for word, value in enumerate((address & 0xFFFFFFFF, address >> 32, first + vector, 0)):
                self._bus.write(entry + 4 * word, 4, value)
        self.device.write(at + 2, pci.MSIX_ENABLE, 2)

    def disable_msix(self) -> None:
        """Back to INTx."""
        self.device.write(self._msix() + 2, 0, 2)

    def map_config(self, vector: int) -> int:
        """Map configuration changes; the vector the device reports."""
        self.write(pci_spec.CONFIG_MSIX_VECTOR, vector)
        return self.read(pci_spec.CONFIG_MSIX_VECTOR)

    def map_queue(self, index: int, vector: int) -> int:
        """Map the event of a queue; the vector the device reports."""
        self.select_queue(index)
        self.write(pci_spec.QUEUE_MSIX_VECTOR, vector)
        return self.read(pci_spec.QUEUE_MSIX_VECTOR)

    # ---- fields ------------------------------------------------------------------------------------

    def read(self, field: int) -> int:
        """Load a field of the common configuration, a half of it when it has 64 bits."""
        return self._bus.read(self._common + field, pci_spec.COMMON_CFG_FIELDS[field])

    def write(self, field: int, value: int) -> None:
        """Store to a field."""
        size = pci_spec.COMMON_CFG_FIELDS[field]
        self._bus.write(self._common + field, size, value & (1 << 8 * size) - 1)

    @property
    def status(self) -> int:
        """``device_status``."""
        return self.read(pci_spec.DEVICE_STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self.write(pci_spec.DEVICE_STATUS, value)

    def offered(self, words: int = 4) -> int:
        """The features the device offers, of ``32 * words`` bits."""
        bits = 0
        for word in range(words):
            self.write(pci_spec.DEVICE_FEATURE_SELECT, word)
            bits |= self.read(pci_spec.DEVICE_FEATURE) << 32 * word
        return bits

    def accept(self, features: int, words: int = 4) -> None:
        """Write the features the driver accepts."""
        self.features = features
        for word in range(words):
            self.write(pci_spec.DRIVER_FEATURE_SELECT, word)
            self.write(pci_spec.DRIVER_FEATURE, features >> 32 * word)

    def select_queue(self, index: int) -> None:
        """``queue_select``."""
        self.write(pci_spec.QUEUE_SELECT, index)

    def queue_size_max(self, index: int) -> int:
        """``queue_size``, the largest before anything smaller was written; 0 when there is no queue."""
        self.select_queue(index)
        return self.read(pci_spec.QUEUE_SIZE)

    def place(self, size: int, desc: int, driver: int, device: int) -> None:
        """Write size and addresses of the selected queue."""
        self.write(pci_spec.QUEUE_SIZE, size)
        for field, address in (
            (pci_spec.QUEUE_DESC, desc),
            (pci_spec.QUEUE_DRIVER, driver),
            (pci_spec.QUEUE_DEVICE, device),
        ):
            self.write(field, address)
            self.write(field + 4, address >> 32)

    def enable_queue(self) -> None:
        """``queue_enable`` 1; remembers where the queue is notified."""
        index = self.read(pci_spec.QUEUE_SELECT)
        self._offsets[index] = self.read(pci_spec.QUEUE_NOTIFY_OFF) * self.multiplier
        self.write(pci_spec.QUEUE_ENABLE, 1)

    @property
    def queue_ready(self) -> int:
        """``queue_enable``."""
        return self.read(pci_spec.QUEUE_ENABLE)

    def reset_queue(self, index: int) -> None:
        """Reset one queue (2.6.1) and check that it is reset; :meth:`setup_queue` sets it up again."""
        self.select_queue(index)
        self.write(pci_spec.QUEUE_RESET, 1)
        assert self.read(pci_spec.QUEUE_RESET) == 0, f"the reset of queue {index} does not end"
        assert self.queue_ready == 0, f"queue {index} is enabled after its reset"

    def notify(self, index: int) -> None:
        """Notify a queue at its address; with NOTIFICATION_DATA, of its ring's position (4.1.5.2).

        A number that is no queue's goes where queue 0 is notified.
        """
        at = self._notify + self._offsets.get(index, 0)
        if self.features >> spec.VIRTIO_F_NOTIFICATION_DATA & 1:
            position = self.queues[index].position if index < len(self.queues) else 0
            self._bus.write(at, 4, position << 16 | index & 0xFFFF)
        else:
            self._bus.write(at, 2, index & 0xFFFF)

    def interrupt_status(self) -> int:
        """The ISR status, which the load clears."""
        return self._bus.read(self._isr, 1)

    def generation(self) -> int:
        """``config_generation``."""
        return self.read(pci_spec.CONFIG_GENERATION)

    def load_config(self, offset: int, size: int) -> int:
        """One load from the device configuration; 0 when the device has none."""
        return self._bus.read(self._config + offset, size) if self._config is not None else 0

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Store to the device configuration."""
        if self._config is not None:
            self._bus.write(self._config + offset, size, value)

    # ---- inside ------------------------------------------------------------------------------------

    def _address(self, cfg_type: int) -> int:
        structure = self.found[cfg_type]
        address, size = self.device.bars[structure.bar]
        assert structure.offset + structure.length <= size, f"{structure} leaves its BAR of {size:#x} bytes"
        return address + structure.offset

    def _msix(self) -> int:
        return next(at for at, kind in self.device.capabilities() if kind == pci.CAP_MSIX)
