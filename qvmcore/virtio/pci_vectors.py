"""Which event of a virtio device interrupts how on PCI: MSI-X vectors, or INTx with the ISR status.

virtio 1.4, 4.1.4.5 (ISR status), 4.1.5.1.2 (vectors), 4.1.5.3 and 4.1.5.4 (notifications).
"""

from __future__ import annotations

import threading

from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.virtio.pci_spec import ISR_CONFIG, ISR_QUEUE, MSI_NO_VECTOR


class Vectors:
    """The vector of each event, and the ISR status. Any thread."""

    def __init__(self, interrupts: PciInterrupts, queues: int) -> None:
        self._interrupts = interrupts
        self._lock = threading.Lock()
        self._isr = 0
        #: Vector of the configuration change event, as the driver reads it.
        self.config = MSI_NO_VECTOR
        self._queues = [MSI_NO_VECTOR] * queues

    def of_queue(self, index: int) -> int:
        """The vector of a queue, as the driver reads it."""
        return self._queues[index] if index < len(self._queues) else MSI_NO_VECTOR

    def map_config(self, vector: int) -> None:
        """Map configuration changes; a vector the table does not have maps them to none."""
        self.config = self._checked(vector)

    def map_queue(self, index: int, vector: int) -> None:
        """Map the event of a queue likewise; nothing when there is no such queue."""
        if index < len(self._queues):
            self._queues[index] = self._checked(vector)

    def queue_event(self, index: int) -> None:
        """A used buffer notification (4.1.5.3)."""
        interrupts = self._interrupts
        if interrupts.msix_enabled:
            # Nothing is sent for NO_VECTOR (4.1.5.3.1).
            interrupts.signal(self._queues[index])
        else:
            self._raise(ISR_QUEUE)

    def config_event(self) -> None:
        """A configuration change: the ISR bit is set in every mode (4.1.4.5.1), then 4.1.5.4."""
        self._raise(ISR_CONFIG)
        self._interrupts.signal(self.config)

    def take_isr(self) -> int:
        """The ISR status; reading clears it and de-asserts INTx (4.1.4.5)."""
        with self._lock:
            isr, self._isr = self._isr, 0
            self._interrupts.set_intx(False)
            return isr

    def reset(self) -> None:
        """Every event unmapped (4.1.5.1.2.1), nothing pending."""
        self.config = MSI_NO_VECTOR
        self._queues = [MSI_NO_VECTOR] * len(self._queues)
        self.take_isr()

    def _checked(self, vector: int) -> int:
        return vector if vector < self._interrupts.vectors else MSI_NO_VECTOR

    def _raise(self, bit: int) -> None:
        with self._lock:
            self._isr |= bit
            self._interrupts.set_intx(True)
