"""The identification registers every PrimeCell has in the last 32 bytes of its page."""

from __future__ import annotations

#: Offset of PeriphID0; eight 32-bit registers follow, one byte each.
FIRST = 0xFE0
_CELL = (0x0D, 0xF0, 0x05, 0xB1)


def identity(offset: int, peripheral: tuple[int, int, int, int]) -> int | None:
    """The identification byte at ``offset``, or None where no identification register is."""
    if offset < FIRST or offset % 4:
        return None
    return (peripheral + _CELL)[(offset - FIRST) // 4]
