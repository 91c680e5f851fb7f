"""Constant bytes of configuration space, as an option writes them: ``"0x40/4=0x12345678"``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FORM = re.compile(r"\s*(?P<offset>\w+)\s*/\s*(?P<size>\w+)\s*=\s*(?P<value>\w+)\s*")
_FIRST, _BEHIND = 0x40, 0x1000


def parse_registers(texts: Iterable[str]) -> dict[int, int]:
    """Offset to byte, little-endian. Raises ValueError that names the bad entry."""
    found: dict[int, int] = {}
    for text in texts:
        offset, size, value = _numbers(text)
        if size not in (1, 2, 4, 8):
            raise ValueError(f"reg: {text!r}: the size is 1, 2, 4 or 8, not {size}")
        if not _FIRST <= offset <= _BEHIND - size:
            raise ValueError(f"reg: {text!r}: expected an offset behind the header, {_FIRST:#x} to 0xfff")
        if value >> 8 * size:
            raise ValueError(f"reg: {text!r}: {value:#x} does not fit {size} bytes")
        for index, byte in enumerate(value.to_bytes(size, "little")):
            if found.setdefault(offset + index, byte) != byte:
                raise ValueError(f"reg: {text!r}: byte {offset + index:#x} was given another value before")
    return found


def _numbers(text: str) -> tuple[int, int, int]:
    match = _FORM.fullmatch(text)
    try:
        if match is not None:
            return int(match["offset"], 0), int(match["size"], 0), int(match["value"], 0)
    except ValueError:
        match = None
    raise ValueError(f"reg: expected OFFSET/SIZE=VALUE such as '0x40/4=0x12345678', not {text!r}")
