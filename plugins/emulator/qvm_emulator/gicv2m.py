"""A GICv2m frame: a register whose write makes a shared interrupt pending, for MSI.

Arm Server Base System Architecture, appendix on GICv2m. The frame owns a range of SPIs, edge-triggered
by the guest's choice; a device's message and a CPU's store to the doorbell do the same.
"""

from __future__ import annotations

from qvm_emulator.gicv2 import GicV2

MSI_TYPER, MSI_SETSPI_NS, MSI_IIDR = 0x008, 0x040, 0xFCC
_IMPLEMENTER = 0x43B  # ARM's JEP106 code


class GicV2m:
    """One frame at ``base`` (guest-physical) with the INTIDs ``lines``; any thread."""

    def __init__(self, gic: GicV2, base: int, size: int, lines: range) -> None:
        self.base = base
        self.size = size
        self._gic = gic
        self._lines = lines

    def message(self, address: int, data: int) -> None:
        """A device wrote ``data`` to ``address``: both are the guest's, anything else is dropped."""
        if address == self.base + MSI_SETSPI_NS:
            self._set(data)

    def read(self, offset: int, size: int) -> int:
        """Registers are 32 bits wide; the rest reads as zero."""
        if size != 4:
            return 0
        if offset == MSI_TYPER:
            return self._lines.start << 16 | len(self._lines)
        return _IMPLEMENTER if offset == MSI_IIDR else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The doorbell takes 16 and 32 bits."""
        if offset == MSI_SETSPI_NS and size in (2, 4):
            self._set(value)

    def _set(self, data: int) -> None:
        intid = data & 0x3FF
        if intid in self._lines:
            self._gic.pulse(intid)
