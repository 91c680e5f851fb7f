"""Base address registers (floor 4; PCI 3.0, 6.2.5.1)."""

from __future__ import annotations

from dataclasses import dataclass

from qvmcore.pci import spec
from qvmcore.types import MmioHandler, Window

#: A memory BAR decodes at least 16 bytes and, here, at most half of the 64-bit aperture.
SMALLEST = 16
_LARGEST_32 = 1 << 31


@dataclass(frozen=True, slots=True)
class Bar:
    """One memory BAR: a register window the guest places. ``number`` is 0 to 5.

    ``window.size`` (bytes) is a power of two, at least 16. ``wide`` makes it a 64-bit BAR, which
    uses up ``number + 1`` as well; ``prefetchable`` promises that reads have no side effects.
    ``handler`` answers accesses on vCPU threads with offsets from the start of the BAR.
    Raises ValueError for what no PCI function can have.
    """

    number: int
    window: Window
    handler: MmioHandler
    wide: bool = False
    prefetchable: bool = False

    def __post_init__(self) -> None:
        size, last = self.window.size, spec.BAR_COUNT - 1 - self.wide
        if not 0 <= self.number <= last:
            raise ValueError(f"BAR {self.number}: a {self.bits}-bit BAR is number 0 to {last}")
        if size < SMALLEST or size & (size - 1):
            raise ValueError(f"BAR {self.number}: {size} bytes; expected a power of two, at least {SMALLEST}")
        if not self.wide and size > _LARGEST_32:
            raise ValueError(f"BAR {self.number}: {size} bytes do not fit a 32-bit BAR; make it wide")

    @property
    def bits(self) -> int:
        """32 or 64."""
        return 64 if self.wide else 32

    @property
    def numbers(self) -> range:
        """The BAR registers it occupies."""
        return range(self.number, self.number + 1 + self.wide)

    @property
    def flags(self) -> int:
        """The read-only low bits of its register: memory space, width, prefetchable."""
        return self.wide * spec.BAR_64BIT | self.prefetchable * spec.BAR_PREFETCHABLE
