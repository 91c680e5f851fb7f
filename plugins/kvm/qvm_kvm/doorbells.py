"""Doorbells as ioeventfds: a guest write to one wakes its worker without an exit to this process."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from qvm_kvm import ioctls
from qvm_kvm.structs import IoEventFd
from qvm_kvm.vm import Vm
from qvmcore.api import AddressSpace, MmioHandler

log = logging.getLogger(__name__)


class Placed(Protocol):
    """What the bus tells of a window."""

    @property
    def base(self) -> int:
        """Where it is."""

    @property
    def handler(self) -> MmioHandler:
        """What it is bound to."""

    @property
    def owner(self) -> str:
        """Its name."""


class Follower(Protocol):
    """Somebody else who is told of windows."""

    def add(self, placed: Placed) -> None:
        """A window was placed."""

    def remove(self, placed: Placed) -> None:
        """A window was taken away."""


class Doorbells:
    """Keeps the ioeventfds of a VM equal to the doorbells of the windows on its buses; any thread.

    Where KVM refuses one, the guest's write takes the slow way through the bus, which works as well.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._closed = False
        self._registered: set[tuple[int, int, int, int | None]] = set()
        #: How many KVM refused so far.
        self.refused = 0

    @property
    def count(self) -> int:
        """How many are registered now."""
        return len(self._registered)

    def follow(self, bus: AddressSpace, *, ports: bool, also: Follower | None = None) -> None:
        """Register the doorbells of every window of ``bus``, now and later; ``also`` is told as well.

        Raises ValueError when the bus has an observer already.
        """
        space = ioctls.IOEVENTFD_PIO if ports else 0

        def placed(window: Placed) -> None:
            self._add(window, space)
            if also is not None:
                also.add(window)

        def removed(window: Placed) -> None:
            self._remove(window, space)
            if also is not None:
                also.remove(window)

        bus.observe(placed, removed)

    def close(self) -> None:
        """Register nothing any more: the VM goes away, and its ioeventfds with it."""
        with self._lock:
            self._closed = True
            self._registered.clear()

    def _add(self, placed: Placed, space: int) -> None:
        for doorbell, fd in placed.handler.doorbells:
            key = (space, placed.base + doorbell.offset, doorbell.size, doorbell.datamatch)
            with self._lock:
                if self._closed:
                    return
                try:
                    self._vm.attach_ioeventfd(_wanted(key, fd, 0))
                except OSError as error:
                    self.refused += 1
                    # Once aloud: a guest that moves a BAR to and fro must not fill the log.
                    log.log(
                        logging.DEBUG if self.refused > 1 else logging.WARNING,
                        "%s: KVM refuses the doorbell at %#x (%s); it takes the slow way",
                        placed.owner,
                        key[1],
                        error.strerror,
                    )
                else:
                    self._registered.add(key)

    def _remove(self, placed: Placed, space: int) -> None:
        for doorbell, fd in placed.handler.doorbells:
            key = (space, placed.base + doorbell.offset, doorbell.size, doorbell.datamatch)
            with self._lock:
                if key not in self._registered:
                    continue
                self._registered.discard(key)
                try:
                    self._vm.attach_ioeventfd(_wanted(key, fd, ioctls.IOEVENTFD_DEASSIGN))
                except OSError as error:
                    log.error("%s: KVM keeps the doorbell at %#x (%s)", placed.owner, key[1], error.strerror)


def _wanted(key: tuple[int, int, int, int | None], fd: int, flags: int) -> IoEventFd:
    space, address, size, match = key
    if match is not None:
        flags |= ioctls.IOEVENTFD_DATAMATCH
    return IoEventFd(match or 0, address, size, fd, space | flags)
