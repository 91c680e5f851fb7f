"""Parts of windows that are memory of this process, mapped into the guest: BARs of physical devices."""

from __future__ import annotations

import logging
import threading

from qvm_kvm.doorbells import Placed
from qvm_kvm.vm import Vm

log = logging.getLogger(__name__)


class DirectWindows:
    """Keeps a VM's memory slots equal to the direct parts of the windows on its bus; any thread.

    Where KVM refuses one, the guest's accesses take the slow way through the bus, which works as well.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._closed = False
        #: Slots by guest-physical address.
        self._slots: dict[int, int] = {}
        #: How many KVM refused so far.
        self.refused = 0

    @property
    def count(self) -> int:
        """How many parts are mapped now."""
        return len(self._slots)

    def add(self, placed: Placed) -> None:
        """A window was placed."""
        for part in placed.handler.direct:
            address = placed.base + part.offset
            with self._lock:
                if self._closed:
                    return
                try:
                    self._slots[address] = self._vm.add_direct(address, part.size, part.host_address)
                except OSError as error:
                    self.refused += 1
                    log.warning("%s: KVM does not map %#x (%s)", placed.owner, address, error.strerror)

    def remove(self, placed: Placed) -> None:
        """A window was taken away."""
        for part in placed.handler.direct:
            with self._lock:
                slot = self._slots.pop(placed.base + part.offset, None)
                if slot is None or self._closed:
                    continue
                try:
                    self._vm.remove_direct(slot)
                except OSError as error:
                    log.error("%s: KVM keeps what was mapped (%s)", placed.owner, error.strerror)

    def close(self) -> None:
        """Map nothing any more: the VM goes away, and its slots with it."""
        with self._lock:
            self._closed = True
            self._slots.clear()
