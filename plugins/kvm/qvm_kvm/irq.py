"""Interrupts from devices to a VM: lines, and messages by cached routes.

An edge is one write to an eventfd KVM listens to; a level is one KVM_IRQ_LINE. A message gets a GSI
and an eventfd of its own at its first use, up to :data:`MAX_ROUTES`; later ones go by KVM_SIGNAL_MSI.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from qvm_kvm.listeners import Listeners
from qvm_kvm.routes import Routes
from qvm_kvm.structs import IrqLevel, Route
from qvm_kvm.vm import Vm
from qvmcore.api import EventFd

log = logging.getLogger(__name__)

#: Each costs a descriptor and a line in the kernel's table, and the guest chooses how many it uses.
MAX_ROUTES = 256


class Interrupts:
    """The interrupt inputs of one VM. ``pins`` are the routes that are always there; any thread.

    ``first_message_gsi`` and up are for messages; ``resample`` is KVM_CAP_IRQFD_RESAMPLE. Raises OSError
    when KVM refuses the pins.
    """

    def __init__(
        self, vm: Vm, pins: Sequence[Route], first_message_gsi: int, *, resample: bool = False
    ) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._routes = Routes(vm, pins, first_message_gsi)
        #: What others signal.
        self.listeners = Listeners(vm, self._routes, resample=resample)
        self._full = False
        self._closed = False
        self._messages: dict[tuple[int, int], EventFd] = {}
        self._lines: list[Line] = []
        #: Messages that went by KVM_SIGNAL_MSI, and messages KVM refused.
        self.slow_messages = 0
        self.refused = 0

    @property
    def routes(self) -> int:
        """How many messages have an eventfd of their own."""
        return len(self._messages)

    @property
    def irqfds(self) -> int:
        """How many eventfds KVM listens to."""
        lines = sum(line.has_irqfd for line in tuple(self._lines))
        return len(self._messages) + lines + self.listeners.count

    def line(self, gsi: int) -> Line:
        """An input of the interrupt controllers."""
        line = Line(self._vm, gsi)
        with self._lock:
            self._lines.append(line)
        return line

    def message_line(self, address: int, data: int) -> MessageLine:
        """A line whose every rising edge is a message."""
        return MessageLine(self, address, data)

    def signal_msi(self, address: int, data: int) -> None:
        """Deliver a message; what KVM refuses is dropped, as the guest chose it."""
        known = self._messages.get((address, data))
        if known is not None:
            known.signal()
        else:
            self._first_use(address, data)

    def _first_use(self, address: int, data: int) -> None:
        with self._lock:
            if self._closed:
                return
            known = self._messages.get((address, data)) or self._add_route(address, data)
            if known is None:
                try:
                    self._vm.signal_msi(address, data)
                    self.slow_messages += 1
                except OSError as error:
                    self.refused += 1
                    log.debug("KVM refuses the message %#x to %#x: %s", data, address, error.strerror)
                return
        known.signal()

    def _add_route(self, address: int, data: int) -> EventFd | None:
        if self._full or len(self._messages) >= MAX_ROUTES:
            return None
        event: EventFd | None = None
        gsi: int | None = None
        try:
            event = EventFd()
            gsi = self._routes.add(address, data)
            self._vm.attach_irqfd(event.fd, gsi)
        except OSError as error:
            # Out of descriptors, or a message KVM does not route: the slow way still works.
            log.debug("no route for the message %#x to %#x: %s", data, address, error.strerror)
            self._full = event is None
            if gsi is not None:
                self._routes.remove(gsi)
            if event is not None:
                event.close()
            return None
        self._messages[address, data] = event
        return event

    def close(self) -> None:
        """Deliver nothing any more, and close the eventfds. Idempotent."""
        self.listeners.close()
        with self._lock:
            self._closed = True
            for line in self._lines:
                line.close()
            for event in self._messages.values():
                event.close()
            self._messages.clear()
            self._lines.clear()


class Line:
    """A GSI as a vdev's interrupt line; any thread."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi
        self._lock = threading.Lock()
        self._level = False
        self._edges: EventFd | None = None
        self._closed = False
        self._low, self._high = IrqLevel(gsi, 0), IrqLevel(gsi, 1)

    @property
    def has_irqfd(self) -> bool:
        """Whether an edge is a write to an eventfd by now."""
        return self._edges is not None

    def pulse(self) -> None:
        """One edge. On a line that is high: down and up again."""
        edges = self._edges
        if edges is not None and not self._level:
            edges.signal()
            return
        with self._lock:
            if self._closed:
                return
            if self._level:
                self._vm.set_line(self._low)
                self._vm.set_line(self._high)
                return
            edges = self._edges or self._attach()
            if edges is None:
                self._vm.set_line(self._high)
                self._vm.set_line(self._low)
                return
        edges.signal()

    def set(self, level: bool) -> None:
        """Drive the line."""
        with self._lock:
            if level != self._level and not self._closed:
                self._level = level
                self._vm.set_line(self._high if level else self._low)

    def _attach(self) -> EventFd | None:
        try:
            event = EventFd()
        except OSError:
            return None  # out of descriptors: KVM_IRQ_LINE works as well
        try:
            self._vm.attach_irqfd(event.fd, self._gsi)
        except OSError as error:
            log.debug("no irqfd for GSI %d: %s", self._gsi, error.strerror)
            event.close()
            return None
        self._edges = event
        return event

    def close(self) -> None:
        """Do nothing any more. Idempotent."""
        with self._lock:
            self._closed = True
            if self._edges is not None:
                self._edges.close()


class MessageLine:
    """A fixed message as a vdev's interrupt line; any thread."""

    def __init__(self, interrupts: Interrupts, address: int, data: int) -> None:
        self._interrupts = interrupts
        self._message = (address, data)
        self._lock = threading.Lock()
        self._level = False

    def pulse(self) -> None:
        """Send the message."""
        self._interrupts.signal_msi(*self._message)

    def set(self, level: bool) -> None:
        """Send the message when the line rises: a message has no level."""
        with self._lock:
            rises, self._level = level and not self._level, level
        if rises:
            self._interrupts.signal_msi(*self._message)
