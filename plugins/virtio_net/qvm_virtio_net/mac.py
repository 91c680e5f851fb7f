"""Ethernet addresses: what people write, and one for who wrote none."""

from __future__ import annotations

import hashlib
import re

_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}|[0-9a-fA-F]{12}")
BROADCAST = b"\xff" * 6


def parse_mac(text: str) -> bytes:
    """``52:54:00:12:34:56`` (or with ``-``, or 12 digits). ValueError says what is wrong with it."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"mac {text!r} is no Ethernet address; expected six bytes as 02:00:00:12:34:56")
    mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    if mac == bytes(6):
        raise ValueError("mac is all zero, which no card may have; leave it out to have one made")
    if mac[0] & 1:
        unicast = format_mac(bytes([mac[0] & 0xFE]) + mac[1:])
        raise ValueError(
            f"mac {text} is a multicast address (lowest bit of the first byte); a card's own is {unicast}"
        )
    return mac


def format_mac(mac: bytes) -> str:
    """``02:00:00:12:34:56``."""
    return mac.hex(":")


def stable_mac(machine: str, name: str) -> bytes:
    """An address for vdev ``name`` of VM ``machine``: the same at every start, locally administered."""
    digest = hashlib.sha256(f"qvm mac\0{machine}\0{name}".encode()).digest()
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]
