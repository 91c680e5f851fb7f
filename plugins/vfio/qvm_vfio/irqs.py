"""The eventfds of one function's interrupts, and how many have arrived.

An eventfd that KVM listens to is taken by KVM: what comes that way is not counted here.
"""

from __future__ import annotations

import errno
import os
import threading

from qvm_vfio import structs
from qvm_vfio.device import VfioDevice
from qvm_vfio.errors import VfioError, failed

KINDS = (structs.INTX, structs.MSI, structs.MSIX)


class Irqs:
    """One kind of interrupt is connected at a time, as the kernel has it. Any thread."""

    def __init__(self, device: VfioDevice) -> None:
        self._device = device
        self._lock = threading.Lock()
        #: Held while a kind is switched, so that none is on after :meth:`drop` that was on its way.
        self._switch = threading.RLock()
        self._fds: list[int] = []
        self._resample = -1
        self._taken = 0
        #: Set when nothing may be connected any more.
        self.revoked = False

    def connect(self, kind: int, count: int) -> tuple[int, ...]:
        """Switch ``count`` interrupts of a kind on; their eventfds, which stay ours. Raises VfioError."""
        if not 0 < count <= self._device.irqs.get(kind, 0):
            have = self._device.irqs.get(kind, 0)
            raise VfioError(f"{self._device.name} has {have} interrupts of kind {kind}, not {count}")
        with self._lock:
            try:
                while len(self._fds) < count:
                    self._fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            except OSError as error:
                raise failed(f"{self._device.name}: no eventfd", error) from error
            fds = tuple(self._fds[:count])
        with self._switch:
            if self.revoked:
                raise VfioError(f"{self._device.name} was taken away; its interrupts stay off")
            for other in KINDS:
                if other != kind:
                    self.disconnect(other)
            for fd in fds:
                self.take(fd)  # of what was connected before
            self._device.connect(kind, fds)
        return fds

    def resample(self) -> int:
        """An eventfd, which stays ours, whose signals unmask INTx while that is on. Raises VfioError."""
        with self._lock:
            if self._resample < 0:
                try:
                    self._resample = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                except OSError as error:
                    raise failed(f"{self._device.name}: no eventfd", error) from error
            fd = self._resample
        self._device.resample_intx(fd)
        return fd

    def disconnect(self, kind: int) -> None:
        """Switch a kind off; nothing when it is not on."""
        if not self._device.irqs.get(kind, 0):
            return
        try:
            with self._switch:
                self._device.disconnect(kind)
        except VfioError as error:
            # The kernel calls it invalid to switch off what is off.
            if error.number != errno.EINVAL:
                raise

    def drop(self) -> None:
        """Switch all off; the eventfds stay, so that a late interrupt would be counted."""
        with self._switch:
            for kind in KINDS:
                self.disconnect(kind)

    def take(self, fd: int) -> int:
        """How often an eventfd was signalled since it was taken last."""
        try:
            count = os.eventfd_read(fd)
        except OSError:
            return 0  # nothing there, or closed by now
        with self._lock:
            self._taken += count
        return count

    def count(self) -> int:
        """All so far, also those nobody has taken."""
        with self._lock:
            return self._taken + sum(_waiting(fd) for fd in self._fds)

    def close(self) -> None:
        """Close the eventfds. Idempotent."""
        with self._lock:
            while self._fds:
                os.close(self._fds.pop())
            if self._resample >= 0:
                os.close(self._resample)
                self._resample = -1


def _waiting(fd: int) -> int:
    """The count of an eventfd, without taking it."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "eventfd-count":
                return int(value, 16)
    return 0
