"""The PCI configuration access capability (virtio 1.4, 4.1.4.9): a BAR seen through a keyhole.

A second way to the structures, for firmware that reaches configuration space only.
"""

from __future__ import annotations

from qvmcore.pci import spec as pci
from qvmcore.pci.capability import Capability, ConfigWindow
from qvmcore.pci.function import PciFunction
from qvmcore.types import MmioHandler
from qvmcore.virtio import pci_spec

_BAR, _OFFSET, _LENGTH, _DATA = 4, 8, 12, pci_spec.CAP_SIZE


class ConfigAccess:
    """struct virtio_pci_cfg_cap. vCPU threads.

    It opens to BAR number ``bar`` only, the one with the structures. What a driver must not ask for
    (another BAR, a length that is not 1, 2 or 4, an unaligned offset, one behind the end) is not
    done: ``pci_cfg_data`` keeps what it has.
    """

    def __init__(self, bar: int) -> None:
        self._bar = bar
        self._data = bytearray(4)
        self._function: PciFunction | None = None
        body = bytearray(_DATA + 4 - 2)
        body[0], body[1] = _DATA + 4, pci_spec.CAP_PCI_CFG
        writable = bytearray(len(body))
        writable[_BAR - 2] = 0xFF
        writable[_OFFSET - 2 : _DATA - 2] = b"\xff" * 8
        window = ConfigWindow(_DATA, 4, MmioHandler(self._read, self._write))
        self.capability = Capability(pci.CAP_VENDOR, bytes(body), bytes(writable), window)

    def connect(self, function: PciFunction) -> None:
        """The function the capability is of."""
        self._function = function

    def _read(self, offset: int, size: int) -> int:
        place = self._place()
        if place is not None:
            function, at, length = place
            self._data[:length] = function.bar_read(self._bar, at, length).to_bytes(length, "little")
        return int.from_bytes(self._data[offset : offset + size], "little")

    def _write(self, offset: int, size: int, value: int) -> None:
        self._data[offset : offset + size] = value.to_bytes(size, "little")
        place = self._place()
        if place is not None:
            function, at, length = place
            function.bar_write(self._bar, at, length, int.from_bytes(self._data[:length], "little"))

    def _place(self) -> tuple[PciFunction, int, int] | None:
        """The access the driver selected: offset and length; None for one it must not make."""
        function = self._function
        if function is None:
            return None
        selected = function.read_capability(self.capability)
        at = int.from_bytes(selected[_OFFSET:_LENGTH], "little")
        length = int.from_bytes(selected[_LENGTH:_DATA], "little")
        size = function.bars[0].window.size
        if selected[_BAR] != self._bar or length not in (1, 2, 4) or at % length or at + length > size:
            return None
        return function, at, length
