"""ACPI Machine Language (floor 8): each function gives the bytes of one term (ACPI 6.3, chapter 20).

Only what a static description of a machine needs: names, data, devices, and methods small enough to
be read here. An object is ``bytes``; terms are put together by concatenation, so ``device("PCI0",
name("_UID", integer(0)))`` reads as the ASL would. Everything raises ValueError for what AML cannot
say; the callers choose names and sizes, so such an error is a bug of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from uuid import UUID

ZERO, ONE = b"\x00", b"\x01"
#: The first local variable and the arguments of a method.
LOCAL0 = b"\x60"
ARG0, ARG1, ARG2, ARG3 = b"\x68", b"\x69", b"\x6a", b"\x6b"

_BYTE, _WORD, _DWORD, _STRING, _QWORD = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
_NAME, _SCOPE, _BUFFER, _PACKAGE, _METHOD = b"\x08", b"\x10", b"\x11", b"\x12", b"\x14"
_DUAL_NAME, _MULTI_NAME = b"\x2e", b"\x2f"
_STORE, _AND, _OR, _CREATE_DWORD_FIELD = b"\x70", b"\x7b", b"\x7d", b"\x8a"
_NOT, _EQUAL, _IF, _ELSE, _RETURN = b"\x92", b"\x93", b"\xa0", b"\xa1", b"\xa4"
_DEVICE = b"\x5b\x82"

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA_ID = re.compile(r"[A-Z]{3}[0-9A-F]{4}")
#: Four-letter vendor IDs and the old form of three letters; four digits (6.1.5).
_ACPI_ID = re.compile(r"[A-Z0-9]{4}[0-9A-F]{4}")


def package_length(size: int) -> bytes:
    """The PkgLength of ``size`` bytes that follow it; it counts itself (20.2.4).

    One byte up to 63; else the first has the number of further bytes and the low four bits.
    """
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for further in (1, 2, 3):
        total = size + 1 + further
        if total < 1 << (4 + 8 * further):
            return bytes([further << 6 | total & 0xF]) + (total >> 4).to_bytes(further, "little")
    raise ValueError(f"an AML package has at most {(1 << 28) - 1} bytes, not {size}")


def path(text: str) -> bytes:
    r"""A NameString such as ``_HID``, ``\_SB`` or ``\_SB.PCI0``; short segments are filled with _."""
    root = b"\\" if text.startswith("\\") else b""
    segments = text.removeprefix("\\").split(".")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise ValueError(f"no ACPI name: {text!r}")
    encoded = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    if len(segments) == 1:
        return root + encoded
    if len(segments) == 2:
        return root + _DUAL_NAME + encoded
    return root + _MULTI_NAME + bytes([len(segments)]) + encoded


def integer(value: int) -> bytes:
    """The shortest form of an unsigned number of up to 64 bits."""
    if value in (0, 1):
        return ONE if value else ZERO
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if 0 <= value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"an AML integer has 64 bits: {value:#x}")


def string(text: str) -> bytes:
    """A string of ASCII characters without NUL."""
    if not text.isascii() or "\0" in text:
        raise ValueError(f"an AML string is ASCII without NUL: {text!r}")
    return _STRING + text.encode() + b"\0"


def buffer(content: bytes) -> bytes:
    """A buffer with this content."""
    return _sized(_BUFFER, integer(len(content)) + content)


def package(items: Iterable[bytes]) -> bytes:
    """A package of at most 255 items."""
    parts = list(items)
    if len(parts) > 0xFF:
        raise ValueError(f"an AML package has at most 255 items, not {len(parts)}")
    return _sized(_PACKAGE, bytes([len(parts)]) + b"".join(parts))


def name(where: str, value: bytes) -> bytes:
    """``Name (where, value)``."""
    return _NAME + path(where) + value


def scope(where: str, *body: bytes) -> bytes:
    """``Scope (where) { body }``."""
    return _sized(_SCOPE, path(where) + b"".join(body))


def device(where: str, *body: bytes) -> bytes:
    """``Device (where) { body }``."""
    return _sized(_DEVICE, path(where) + b"".join(body))


def method(where: str, arguments: int, *body: bytes) -> bytes:
    """``Method (where, arguments, Serialized) { body }``: one call at a time, so it may name objects."""
    if not 0 <= arguments <= 7:
        raise ValueError(f"a method has 0 to 7 arguments, not {arguments}")
    return _sized(_METHOD, path(where) + bytes([arguments | 1 << 3]) + b"".join(body))


def if_(condition: bytes, *body: bytes) -> bytes:
    """``If (condition) { body }``."""
    return _sized(_IF, condition + b"".join(body))


def else_(*body: bytes) -> bytes:
    """``Else { body }``, directly behind an :func:`if_`."""
    return _sized(_ELSE, b"".join(body))


def equal(left: bytes, right: bytes) -> bytes:
    """Whether two values are the same."""
    return _EQUAL + left + right


def not_(value: bytes) -> bytes:
    """The logical opposite."""
    return _NOT + value


def store(value: bytes, target: bytes) -> bytes:
    """``target = value``."""
    return _STORE + value + target


def and_(left: bytes, right: bytes, target: bytes) -> bytes:
    """``target = left & right``."""
    return _AND + left + right + target


def or_(left: bytes, right: bytes, target: bytes) -> bytes:
    """``target = left | right``."""
    return _OR + left + right + target


def create_dword_field(source: bytes, offset: int, where: str) -> bytes:
    """Name the 32-bit number at byte ``offset`` of a buffer."""
    return _CREATE_DWORD_FIELD + source + integer(offset) + path(where)


def return_(value: bytes) -> bytes:
    """``Return (value)``."""
    return _RETURN + value


def hardware_id(text: str) -> bytes:
    """The value of a _HID or _CID: ``PNP0A03`` as a compressed number, ``LNRO0005`` as a string.

    Raises ValueError for what is neither (6.1.5).
    """
    if _EISA_ID.fullmatch(text):
        letters = 0
        for letter in text[:3]:
            letters = letters << 5 | ord(letter) - ord("@")
        # Byte by byte in the order of the text: big-endian seen as a little-endian number.
        number = letters << 16 | int(text[3:], 16)
        return integer(int.from_bytes(number.to_bytes(4, "big"), "little"))
    if not _ACPI_ID.fullmatch(text):
        raise ValueError(
            f"expected three capitals and four hexadecimal digits, or eight of them, not {text!r}"
        )
    return string(text)


def uuid(text: str) -> bytes:
    """A buffer with a UUID: the first three groups have their bytes swapped (19.6.141)."""
    return buffer(UUID(text).bytes_le)


def _sized(opcode: bytes, content: bytes) -> bytes:
    return opcode + package_length(len(content)) + content
