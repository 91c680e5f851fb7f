"""What quiescing needs of a physical device: registers, resets, memory; nothing of any driver.

Implemented over VFIO and UIO by ``qvm_vfio``, and by :mod:`qvm_quiesce.simulated`. Every method may be
called from any thread and may block as long as the hardware or the kernel does: the runner calls each from
a thread that it can abandon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class HardwareError(Exception):
    """An access that the host refused, with the host's reason."""


class Handover(NamedTuple):
    """How another process takes a device over, once it has the descriptors.

    ``adopt`` names a function as ``module:name``; called with ``values`` (JSON-able) and the received
    descriptors, in order, it gives the Hardware. ``path`` is where Python finds that module.
    """

    adopt: str
    path: str
    values: dict[str, Any]
    fds: tuple[int, ...]


class Hardware(Protocol):
    """One physical device that belongs to this process. All methods raise HardwareError."""

    #: It is no PCI function: it has no configuration space, no bus mastering and no reset. What is called
    #: a BAR below is a range of its registers, and only a register script can stop it.
    platform: bool

    @property
    def name(self) -> str:
        """Its place on the host, e.g. ``0000:03:00.0`` or ``uio:uio0``."""

    def config_read(self, offset: int, size: int) -> int:
        """``size`` (1, 2, 4) bytes of its configuration space, unsigned."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write to its configuration space."""

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """``size`` (1, 2, 4, 8) bytes of a BAR, unsigned."""

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write to a BAR."""

    @property
    def resets(self) -> Sequence[str]:
        """The resets the host can do, strongest last: of ``flr``, ``af-flr``, ``pm``, ``bus``."""

    def reset(self, method: str) -> None:
        """Do one of :attr:`resets`; returns when the host has done its part."""

    def revoke(self) -> None:
        """Take away every way by which a guest reaches it: mapped BARs, doorbells. Idempotent."""

    def drop_interrupts(self) -> None:
        """Disconnect every interrupt from its eventfd. Idempotent."""

    def interrupts(self) -> int:
        """How many interrupts have arrived since the start; counts on when nobody takes them."""

    def memory(self) -> Sequence[memoryview]:
        """The memory it can write to by DMA. The views are for the calling thread: each asks anew."""

    def unmap_dma(self) -> None:
        """Take that memory away from it. Idempotent."""

    def handover(self) -> Handover:
        """What the guard needs to act when this process is gone. Descriptors stay this process's own.

        After :meth:`surrender`: what is left, so that somebody else can take the device anew.
        """

    def surrender(self) -> None:
        """Give the device back to the host's kernel, which then does its own part; but keep the memory
        where the device may still write to it. Idempotent."""

    def close(self) -> None:
        """Give back the device and its memory. Idempotent."""
