"""Resource descriptors of ``_CRS`` (floor 8): addresses and interrupts of a device (ACPI 6.3, 6.4).

Addresses and sizes are bytes, or port numbers. :func:`template` closes a list of descriptors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from qvmcore.acpi import aml
from qvmcore.types import Trigger

_PORTS, _FIXED_32, _INTERRUPTS, _END = 0x47, 0x86, 0x89, 0x79
#: Address space descriptors by the width of their numbers: tag and format of one number.
_ADDRESS = {16: (0x88, "H"), 32: (0x87, "I"), 64: (0x8A, "Q")}
_MEMORY, _IO, _BUS = 0, 1, 2
_CONSUMER = 1 << 0  # the device itself answers there, it does not pass the range on
_FIXED = 1 << 2 | 1 << 3  # first and last address cannot move
_WRITABLE = 1  # memory: reads and writes, not cacheable
_ENTIRE_RANGE = 3  # ports: ISA and other ones
_EDGE = 1 << 1


def template(descriptors: Iterable[bytes]) -> bytes:
    """The buffer that is the value of a ``_CRS``. A checksum of 0 means that there is none."""
    return aml.buffer(b"".join(descriptors) + bytes([_END, 0]))


def memory(base: int, size: int) -> bytes:
    """Registers of a device in memory."""
    if base + size <= 1 << 32:
        return struct.pack("<BHBII", _FIXED_32, 9, _WRITABLE, base, size)
    return _range(64, _MEMORY, _CONSUMER, _WRITABLE, base, size)


def ports(base: int, size: int) -> bytes:
    """Registers of a device in the I/O space."""
    if size <= 0xFF:
        return struct.pack("<BBHHBB", _PORTS, 1, base, base, 1, size)
    return _range(32, _IO, _CONSUMER, _ENTIRE_RANGE, base, size)


def interrupts(lines: Sequence[int], trigger: Trigger) -> bytes:
    """Global interrupts of a device, active high, not shared."""
    flags = _CONSUMER | (_EDGE if trigger is Trigger.EDGE else 0)
    body = struct.pack(f"<BB{len(lines)}I", flags, len(lines), *lines)
    return struct.pack("<BH", _INTERRUPTS, len(body)) + body


def bus_window(first: int, last: int) -> bytes:
    """The bus numbers below a host bridge."""
    return _range(16, _BUS, 0, 0, first, last - first + 1)


def memory_window(base: int, size: int) -> bytes:
    """A range that a host bridge passes on to the functions below it."""
    return _range(32 if base + size <= 1 << 32 else 64, _MEMORY, 0, _WRITABLE, base, size)


def _range(width: int, kind: int, usage: int, flags: int, base: int, size: int) -> bytes:
    tag, number = _ADDRESS[width]
    # Granularity, first, last, translation, length.
    body = struct.pack(f"<BBB5{number}", kind, usage | _FIXED, flags, 0, base, base + size - 1, 0, size)
    return struct.pack("<BH", tag, len(body)) + body
