"""PCI capabilities (floor 4; PCI 3.0, 6.7): the linked list behind the header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qvmcore.types import MmioHandler


@dataclass(frozen=True, slots=True)
class ConfigWindow:
    """Bytes of configuration space that a handler answers instead of stored bytes.

    ``start`` is relative to the capability's first byte (its ID), ``size`` in bytes. The handler
    sees offsets from ``start`` and only accesses that lie wholly inside; it runs on a vCPU thread
    without the function's lock, so it may call the function back.
    """

    start: int
    size: int
    handler: MmioHandler


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability. ``body`` is what follows the ID and the next pointer, i.e. starts at byte 2.

    ``writable`` is a mask over ``body``: a set bit is one that the guest may change; missing bytes
    count as 0. A vendor capability (``kind`` 0x09) puts its own length into ``body[0]``, as the
    standard asks. ``window``, if any, lies within the capability. ``written`` is told all its bytes after a
    write to any of them, and after a reset of the function; on a vCPU thread with the function's lock held.
    """

    kind: int
    body: bytes
    writable: bytes = b""
    window: ConfigWindow | None = None
    written: Callable[[bytes], None] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.kind <= 0xFF:
            raise ValueError(f"capability ID {self.kind:#x}: expected one byte")
        if len(self.writable) > len(self.body):
            raise ValueError(f"capability {self.kind:#x}: the mask is longer than the body")
        window = self.window
        if window is not None and not (
            window.start >= 2 and window.size > 0 and window.start + window.size <= self.size
        ):
            raise ValueError(f"capability {self.kind:#x}: its window is not inside it")

    @property
    def size(self) -> int:
        """Bytes, ID and next pointer included."""
        return 2 + len(self.body)
