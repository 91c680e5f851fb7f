"""PCI's older way to the configuration space, by two I/O ports (floor 4; PCI 3.0, 3.2.2.3.2).

Bits of the address register, port 0xCF8: 31 enable, 23:16 bus, 15:11 device, 10:8 function, 7:2 register.
It reaches the first 256 bytes of a function; what it cannot reach reads all ones.
"""

from __future__ import annotations

from collections.abc import Callable

from qvmcore.bus import all_ones
from qvmcore.pci import spec
from qvmcore.types import Window

#: The address register and the data register, four bytes each.
CONFIG_PORTS = Window(8, access=frozenset({1, 2, 4}))
_DATA = 4
_ENABLE = 1 << 31
_BUS = 0xFF << 16
_FUNCTION_SHIFT, _FUNCTION_MASK = 8, 0xFF
_REGISTER = 0xFC
#: The bits the address register keeps.
_WRITABLE = 0x80FFFFFC


class ConfigPorts:
    """The two registers in front of an ECAM window; any vCPU thread.

    ``read`` and ``write`` take offsets into the ECAM window of bus 0.
    """

    def __init__(self, read: Callable[[int, int], int], write: Callable[[int, int, int], None]) -> None:
        self._read = read
        self._write = write
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        """A read of one of the ports."""
        if offset >= _DATA:
            place = self._place(offset - _DATA, size)
            return all_ones(size) if place is None else self._read(place, size)
        # The register takes accesses of 32 bits only; smaller ones would go to other devices.
        return self._address if offset == 0 and size == 4 else all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A write to one of the ports."""
        if offset >= _DATA:
            place = self._place(offset - _DATA, size)
            if place is not None:
                self._write(place, size, value)
        elif offset == 0 and size == 4:
            self._address = value & _WRITABLE

    def _place(self, byte: int, size: int) -> int | None:
        """Where in the ECAM window an access to the data register goes; None when nowhere."""
        address = self._address
        if not address & _ENABLE or address & _BUS or byte + size > 4:
            return None
        function = address >> _FUNCTION_SHIFT & _FUNCTION_MASK
        return (function << spec.ECAM_FUNCTION_SHIFT) + (address & _REGISTER) + byte
