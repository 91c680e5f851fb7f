"""Sizes, addresses, numbers and truth values as people write them (floor 1), QNX spelling.

==============  =======================================
``0x1c0d0000``  hexadecimal
``16M``         suffix K, M, G or T, either case, powers of 1024
``0d16384``     decimal, said explicitly
``16384``       decimal
==============  =======================================

Every parser takes ``what``, the name of the thing, as the beginning of its error message.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?P<hex>0[xX][0-9a-fA-F]+)|(?:0[dD])?(?P<decimal>[0-9]+)")
_SUFFIXED = re.compile(r"(?P<number>.*?)(?P<suffix>[KMGTkmgt])?")
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_MAX = (1 << 64) - 1

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


class Size(int):
    """A number of bytes; written ``"64K"``, ``"16M"``, ``"0x1000"`` or as a plain integer."""


class Address(int):
    """A guest-physical address in bytes; written ``0x1c0d0000``, as an integer or a string."""


def parse_number(text: str, what: str = "") -> int:
    """``"0x10"``, ``"0d16"`` or ``"16"`` -> 16. Raises ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(_message(what, f"expected a whole number, not {text!r}"))
    return int(match["hex"], 16) if match["hex"] else int(match["decimal"])


def parse_size(value: int | str, what: str = "") -> Size:
    """A number of bytes: ``"16M"`` -> 16777216. Raises ValueError."""
    expected = "expected a size such as 64K, 16M or 1G"
    return Size(_parse_scaled(value, what, expected))


def parse_address(value: int | str, what: str = "") -> Address:
    """A guest-physical address; QNX's ``mem:`` prefix is accepted. Raises ValueError."""
    expected = "expected an address such as 0x1c0d0000"
    if isinstance(value, str):
        return Address(_parse_scaled(value.strip().removeprefix("mem:"), what, expected, shown=value))
    return Address(_parse_scaled(value, what, expected))


def parse_bool(text: str, what: str = "") -> bool:
    """on/off, yes/no, true/false, 1/0 in any case, as QNX's booleans. Raises ValueError."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(_message(what, f"expected true or false, not {text!r}"))


def format_size(size: int) -> str:
    """``16777216`` -> ``16M``; exact where possible, else one decimal."""
    for suffix in ("T", "G", "M", "K"):
        unit = 1 << _SHIFT[suffix.lower()]
        if size >= unit:
            return f"{size // unit}{suffix}" if size % unit == 0 else f"{size / unit:.1f}{suffix}"
    return f"{size} bytes"


def _parse_scaled(value: int | str, what: str, expected: str, shown: object = None) -> int:
    number = value
    if isinstance(value, str):
        match = _SUFFIXED.fullmatch(value.strip())
        digits = _NUMBER.fullmatch(match["number"]) if match else None
        if match is None or digits is None:
            raise ValueError(_message(what, f"{expected}, not {shown if shown is not None else value!r}"))
        scale = _SHIFT[(match["suffix"] or "").lower()]
        number = parse_number(match["number"]) << scale
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(_message(what, f"{expected}, not {value!r}"))
    if not 0 <= number <= _MAX:
        raise ValueError(_message(what, f"{expected}, not {value}: it must be from 0 to 2^64 - 1"))
    return number


def _message(what: str, text: str) -> str:
    return f"{what}: {text}" if what else text
