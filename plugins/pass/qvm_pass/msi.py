"""The MSI capability the guest sees (PCI 3.0, 6.8.1): 64-bit addresses, messages with a mask bit each.

All of it is ours, whatever the device's own can do: VFIO keeps that one, with messages of the host.
"""

from __future__ import annotations

from collections.abc import Callable

from qvm_quiesce import pci

from qvmcore.api import Capability, ConfigWindow, MmioHandler

MOST = 32
#: Bytes of the capability with mask and pending bits.
SIZE = 24
_CAPABLE_SHIFT, _ENABLE_SHIFT, _WIDE, _MASKABLE = 1, 4, 1 << 7, 1 << 8
_ADDRESS, _DATA, _MASK, _PENDING = 4, 12, 16, 20

#: Address and data of each message, None for a masked one; empty while MSI is off.
Messages = tuple[tuple[int, int] | None, ...]


def capability(count: int, told: Callable[[Messages], None], pending: Callable[[], int]) -> Capability:
    """For ``count`` messages, a power of two up to 32. ``told`` is called, with the function's lock held,
    after each write of the guest; ``pending`` gives the pending bits."""
    exponent = count.bit_length() - 1
    every = (1 << count) - 1
    control = exponent << _CAPABLE_SHIFT | _WIDE | _MASKABLE

    def written(registers: bytes) -> None:
        told(messages(registers))

    body = bytearray(SIZE - 2)
    body[0:2] = control.to_bytes(2, "little")
    writable = bytearray(_PENDING - 2)
    writable[0:2] = (pci.MSI_ENABLE | 7 << _ENABLE_SHIFT).to_bytes(2, "little")
    writable[_ADDRESS - 2 : _DATA - 2] = (~3 & (1 << 64) - 1).to_bytes(8, "little")
    writable[_DATA - 2 : _DATA] = b"\xff\xff"
    writable[_MASK - 2 : _PENDING - 2] = every.to_bytes(4, "little")

    def read(offset: int, size: int) -> int:
        return (pending() & every) >> 8 * offset & (1 << 8 * size) - 1

    window = ConfigWindow(_PENDING, 4, MmioHandler(read, lambda offset, size, value: None))
    return Capability(pci.CAP_MSI, bytes(body), bytes(writable), window, written)


def messages(registers: bytes) -> Messages:
    """What the registers mean. The device puts a message's number into the lowest bits of the data."""

    def field(at: int, size: int) -> int:
        return int.from_bytes(registers[at : at + size], "little")

    control = field(pci.MSI_CONTROL, 2)
    if not control & pci.MSI_ENABLE:
        return ()
    # More than it is capable of is reserved, and is what it is capable of.
    exponent = min(control >> _ENABLE_SHIFT & 7, control >> _CAPABLE_SHIFT & 7)
    address, data, mask = field(_ADDRESS, 8), field(_DATA, 2), field(_MASK, 4)
    count = 1 << exponent
    return tuple(
        None if mask >> number & 1 else (address, data & ~(count - 1) | number) for number in range(count)
    )
