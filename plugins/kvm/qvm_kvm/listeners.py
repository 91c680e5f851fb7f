"""Eventfds of others that KVM listens to: those VFIO signals for a physical device's interrupts.

A message needs a GSI of its own while its eventfd is attached. One that is idle keeps its message, so a
guest that masks and unmasks changes no route, until another message needs it: a guest that writes new
messages for ever uses no more GSIs than it has vectors.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from qvm_kvm.routes import Routes
from qvm_kvm.vm import Vm

log = logging.getLogger(__name__)

#: Each is a line in the kernel's table.
MAX_MESSAGES = 256


class Listeners:
    """``resample``: KVM tells when the guest has served a line (KVM_CAP_IRQFD_RESAMPLE). Any thread.

    An eventfd of a count when it is attached interrupts at once, and keeps its count; later ones are taken.
    """

    def __init__(self, vm: Vm, routes: Routes, *, resample: bool) -> None:
        self._vm = vm
        self._routes = routes
        self._resample = resample
        self._lock = threading.Lock()
        self._closed = False
        #: The message by GSI, of those that nothing is attached to.
        self._idle: dict[int, tuple[int, int]] = {}
        self._messages = 0
        #: Eventfd, GSI and message (None: a line) by a number of our own.
        self._attached: dict[int, tuple[int, int, tuple[int, int] | None]] = {}
        self._next = 0

    @property
    def count(self) -> int:
        """How many eventfds are attached now."""
        return len(self._attached)

    @property
    def routes(self) -> int:
        """How many GSIs there are for messages."""
        return self._messages

    def message(self, fd: int, address: int, data: int) -> Callable[[], None] | None:
        """See Guest.listen."""
        with self._lock:
            if self._closed:
                return None
            message = (address, data)
            gsi = self._gsi(message)
            if gsi is None:
                return None
            stop = self._attach(fd, gsi, message)
            if stop is None:
                self._idle[gsi] = message
            return stop

    def line(self, fd: int, gsi: int, resample: int) -> Callable[[], None] | None:
        """See Guest.listen_level."""
        with self._lock:
            if self._closed or not self._resample:
                return None
            return self._attach(fd, gsi, None, resample)

    def _gsi(self, message: tuple[int, int]) -> int | None:
        """A GSI that is this message, taken out of the idle ones; None when there is none left."""
        found = next((gsi for gsi, old in self._idle.items() if old == message), None)
        try:
            if found is None and self._idle:
                oldest = next(iter(self._idle))
                self._routes.change(oldest, *message)
                found = oldest
            if found is None and self._messages < MAX_MESSAGES:
                found = self._routes.add(*message)
                self._messages += 1
                return found
        except OSError as error:
            log.debug("no route for the message %#x to %#x: %s", message[1], message[0], error.strerror)
            return None
        if found is not None:
            del self._idle[found]
        return found

    def _attach(
        self, fd: int, gsi: int, message: tuple[int, int] | None, resample: int = -1
    ) -> Callable[[], None] | None:
        try:
            self._vm.attach_irqfd(fd, gsi, resample)
        except OSError as error:
            log.debug("no irqfd for GSI %d: %s", gsi, error.strerror)
            return None
        self._next += 1
        self._attached[self._next] = fd, gsi, message
        return partial(self._stop, self._next)

    def _stop(self, number: int) -> None:
        with self._lock:
            entry = self._attached.pop(number, None)
            if entry is None:
                return
            fd, gsi, message = entry
            self._detach(fd, gsi)
            if message is not None:
                self._idle[gsi] = message

    def _detach(self, fd: int, gsi: int) -> None:
        try:
            self._vm.detach_irqfd(fd, gsi)
        except OSError as error:
            log.error("KVM keeps an eventfd on GSI %d: %s", gsi, error.strerror)

    def close(self) -> None:
        """Detach all, for good. Idempotent."""
        with self._lock:
            self._closed = True
            for fd, gsi, _ in self._attached.values():
                self._detach(fd, gsi)
            self._attached.clear()
