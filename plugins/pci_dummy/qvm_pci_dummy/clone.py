"""The identity of a host's PCI function, read from its configuration space."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from qvmcore.api import HostError

_SYSFS = Path("/sys/bus/pci/devices")
_ADDRESS = re.compile(r"(?:[0-9a-fA-F]{4}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_HEADER_SIZE = 64
_TYPE_0 = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """What a type 0 header says about a function."""

    vendor: int
    device: int
    revision: int
    class_code: int
    subsystem_vendor: int
    subsystem: int


def read_identity(source: str, base_dir: Path) -> Identity:
    """``0000:00:1f.0``, or a file relative to ``base_dir``. Raises HostError with the reason."""
    if _ADDRESS.fullmatch(source):
        full = source if source.count(":") == 2 else f"0000:{source}"
        path = _SYSFS / full / "config"
    else:
        path = base_dir / source
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_SIZE)
    except OSError as error:
        raise HostError.from_os("read", path, error) from error
    if len(header) < _HEADER_SIZE:
        raise HostError(f"{path}: {len(header)} bytes; a configuration space has at least {_HEADER_SIZE}")
    if header[0x0E] & 0x7F != _TYPE_0:
        raise HostError(f"{path}: it is a bridge; only an ordinary function can be cloned")
    vendor, device = struct.unpack_from("<HH", header, 0)
    subsystem_vendor, subsystem = struct.unpack_from("<HH", header, 0x2C)
    class_code = int.from_bytes(header[9:12], "little")
    return Identity(vendor, device, header[8], class_code, subsystem_vendor, subsystem)
