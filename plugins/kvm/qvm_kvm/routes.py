"""The table that says what each GSI of a VM is: an input of the controllers, or a message. Any thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from qvm_kvm import ioctls
from qvm_kvm.structs import Route
from qvm_kvm.vm import Vm


class Routes:
    """``pins`` are always there; GSIs from ``first`` on are for messages. Methods raise OSError."""

    def __init__(self, vm: Vm, pins: Sequence[Route], first: int) -> None:
        self._vm = vm
        self._pins = list(pins)
        self._lock = threading.Lock()
        self._messages: dict[int, Route] = {}
        self._free: list[int] = []
        self._next = first
        vm.set_routes(self._pins)

    def add(self, address: int, data: int) -> int:
        """A GSI for a message."""
        with self._lock:
            gsi = self._free[-1] if self._free else self._next
            self._set({**self._messages, gsi: _message(gsi, address, data)})
            if self._free:
                self._free.pop()
            else:
                self._next += 1
        return gsi

    def change(self, gsi: int, address: int, data: int) -> None:
        """Another message for a GSI, and for what is attached to it."""
        with self._lock:
            self._set({**self._messages, gsi: _message(gsi, address, data)})

    def remove(self, gsi: int) -> None:
        """Nothing is attached to it any more. The kernel learns of it with the next change."""
        with self._lock:
            del self._messages[gsi]
            self._free.append(gsi)

    def _set(self, messages: dict[int, Route]) -> None:
        self._vm.set_routes([*self._pins, *messages.values()])
        self._messages = messages


def _message(gsi: int, address: int, data: int) -> Route:
    route = Route(gsi, ioctls.ROUTE_MSI)
    route.u.msi.address_lo = address & 0xFFFFFFFF
    route.u.msi.address_hi = address >> 32
    route.u.msi.data = data
    return route
