"""virtio over PCI, modern devices only (virtio 1.4, 4.1): one function per virtio device.

All structures lie in BAR 0, 64 bits wide, a page for each; the MSI-X table has a BAR of its own::

    0x0000  common configuration           4.1.4.3
    0x1000  ISR status, one byte           4.1.4.5
    0x2000  device configuration           4.1.4.6
    0x3000  notification, 4 bytes a queue  4.1.4.4
"""

from __future__ import annotations

import struct

from qvmcore.errors import PluginError
from qvmcore.pci import spec as pci
from qvmcore.pci.bar import Bar
from qvmcore.pci.capability import Capability
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.types import Doorbell, MmioHandler, PciId, Window
from qvmcore.virtio import pci_spec, spec
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.pci_access import ConfigAccess
from qvmcore.virtio.pci_common import CommonConfig
from qvmcore.virtio.pci_vectors import Vectors

#: The BAR of the structures, and the one of the MSI-X table behind its upper half.
STRUCTURES_BAR, MSIX_BAR = 0, 2
_PAGE = 0x1000
COMMON, ISR, DEVICE, NOTIFY = 0, _PAGE, 2 * _PAGE, 3 * _PAGE
#: No structure takes 8-byte accesses: a 64-bit field is two fields of 32 bits (4.1.3).
STRUCTURES = Window(4 * _PAGE, access=frozenset({1, 2, 4}))
#: A power of two and a multiple of 4, for notifications with data (4.1.4.4.1).
NOTIFY_OFF_MULTIPLIER = 4
_QUEUES_MAX = _PAGE // NOTIFY_OFF_MULTIPLIER


def identity_of(cls: type[VirtioVdev]) -> PciId:
    """Who a device of this class is on PCI (4.1.2.1)."""
    return PciId(
        pci_spec.VENDOR_ID,
        pci_spec.DEVICE_ID_BASE + cls.device_id,
        cls.vendor_id,
        pci_spec.SUBSYSTEM_ID_BASE + cls.device_id,
        pci_spec.REVISION,
    )


def class_of(cls: type[VirtioVdev]) -> int:
    """The PCI class code: base class, sub-class, interface."""
    return pci_spec.CLASS_CODES.get(cls.device_id, pci_spec.CLASS_OTHER)


class PciTransport:
    """Makes a virtio device a PCI function: :attr:`function`, to be hung on a bus.

    Made once, at freeze, before the guest starts. :meth:`read` and :meth:`write` run on vCPU threads,
    several at a time. A vector for each queue and one for configuration changes (4.1.5.1.2).
    ``fast_doorbells``: the engine signals the eventfds of the doorbells by itself.
    """

    def __init__(self, vdev: VirtioVdev, *, fast_doorbells: bool = False) -> None:
        queues = len(vdev.queue_sizes)
        if queues > _QUEUES_MAX:
            raise PluginError(f"{vdev.vdev_type}: {queues} queues; virtio over PCI here has {_QUEUES_MAX}")
        config_length = len(vdev.config_space())
        if config_length > _PAGE:
            raise PluginError(f"{vdev.vdev_type}: config_space() exceeds the {_PAGE} bytes of its window")
        self._state = vdev.virtio
        self._config = vdev.virtio.config
        interrupts = PciInterrupts(queues + 1)
        self._vectors = Vectors(interrupts, queues)
        self._common = CommonConfig(vdev.virtio, self._vectors)
        # A notification of 32 bits carries the position too (4.1.5.2); its address says the queue.
        self._state.attach(self, 1 << spec.VIRTIO_F_NOTIFICATION_DATA, fast_doorbells=fast_doorbells)
        access = ConfigAccess(STRUCTURES_BAR)
        structures = MmioHandler(self.read, self.write, self._doorbells())
        #: The function with its configuration space.
        self.function = PciFunction(
            identity_of(type(vdev)),
            class_of(type(vdev)),
            bars=[Bar(STRUCTURES_BAR, STRUCTURES, structures, wide=True)],
            capabilities=[*_structures(queues, config_length), access.capability],
            interrupts=interrupts,
            msix_bar=MSIX_BAR,
        )
        access.connect(self.function)
        # What is not the master of its bus cannot read a ring (4.1.1; PCI 3.0, 6.2.2).
        self._state.hold(True)
        self.function.on_bus_master = lambda master: self._state.hold(not master)

    def read(self, offset: int, size: int) -> int:
        """A load from BAR 0."""
        if offset < ISR:
            return self._common.read(offset, size)
        if offset < DEVICE:
            return self._vectors.take_isr() if offset == ISR and size == 1 else 0
        if offset < NOTIFY:
            return self._config.read(offset - DEVICE, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A store to BAR 0."""
        if offset >= NOTIFY:
            # Which queue is meant, the address says; behind the last queue the state machine finds none.
            index, odd = divmod(offset - NOTIFY, NOTIFY_OFF_MULTIPLIER)
            if size == 2 and not odd:
                self._state.notify_queue(index)
            elif size == 4 and not odd:
                # A position behind the number of the queue (4.1.5.2).
                self._state.notify(value & ~0xFFFF | index)
        elif offset < ISR:
            self._common.write(offset, size, value)
        elif offset >= DEVICE:
            self._state.write_config(offset - DEVICE, size, value)

    # ---- Transport: called by the state machine, any thread ----------------------------------

    def interrupt_queue(self, index: int) -> None:
        """A used buffer notification (4.1.5.3)."""
        self._vectors.queue_event(index)

    def interrupt_config(self) -> None:
        """A configuration change notification (4.1.5.4)."""
        self._vectors.config_event()

    def reset(self) -> None:
        """Reset unmaps every vector, clears the ISR status and the selectors."""
        self._common.reset()
        self._vectors.reset()

    # ---- inside ----------------------------------------------------------------------------------

    def _doorbells(self) -> tuple[tuple[Doorbell, int], ...]:
        """The notification addresses in BAR 0, and the eventfd each one signals."""
        return tuple(
            (Doorbell(NOTIFY + NOTIFY_OFF_MULTIPLIER * index, size), event.fd)
            for index, event in enumerate(self._state.doorbells)
            for size in (2, 4)
        )


def _structures(queues: int, config_length: int) -> list[Capability]:
    """The virtio structure capabilities (4.1.4)."""
    multiplier = struct.pack("<I", NOTIFY_OFF_MULTIPLIER)
    notify_length = NOTIFY_OFF_MULTIPLIER * max(1, queues)
    capabilities = [
        _structure(pci_spec.CAP_COMMON_CFG, COMMON, pci_spec.COMMON_CFG_SIZE),
        _structure(pci_spec.CAP_NOTIFY_CFG, NOTIFY, notify_length, multiplier),
        _structure(pci_spec.CAP_ISR_CFG, ISR, 1),
    ]
    if config_length:
        capabilities.append(_structure(pci_spec.CAP_DEVICE_CFG, DEVICE, config_length))
    return capabilities


def _structure(cfg_type: int, offset: int, length: int, extra: bytes = b"") -> Capability:
    """struct virtio_pci_cap and what follows it."""
    size = pci_spec.CAP_SIZE + len(extra)
    body = struct.pack("<BBBBxxII", size, cfg_type, STRUCTURES_BAR, 0, offset, length)
    return Capability(pci.CAP_VENDOR, body + extra)
