"""Checksums and TCP segmentation in software, for a driver that can do neither (virtio 1.4, 5.1.9.2).

The sending VM was promised that its unfinished frames arrive. When the receiving driver did not
negotiate the matching offload, they are finished here. Slow, right, and rare: Linux takes all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from qvm_virtio_net import spec
from qvm_virtio_net.header import Header, Malformed

_IP_TOTAL, _IP_ID, _IP_SUM = 2, 4, 10
_TCP_SEQ, _TCP_FLAGS, _TCP_SUM = 4, 13, 16
_FIN, _PSH, _CWR = 0x01, 0x08, 0x80
#: The smallest segment Linux makes of TCP, and the longest headers worth a copy, bytes.
_SEGMENT_MIN, _HEADERS_MAX = 48, 256
_VLAN = b"\x81\x00"


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The ones' complement sum of the big-endian 16-bit words, padded with a zero byte; 0 to 0xffff."""
    total = int.from_bytes(data, "big") << (8 * (len(data) & 1))
    # 2^16 is 1 modulo 65535, so the remainder is the sum with its carries; 0 stands for both zeros.
    return total % 0xFFFF or (0xFFFF if total else 0)


def finish_checksum(frame: bytearray, header: Header) -> None:
    """Complete the partial checksum the header speaks of, in place. The header was parsed: in bounds."""
    place = header.csum_start + header.csum_offset
    value = ~ones_sum(memoryview(frame)[header.csum_start :]) & 0xFFFF
    # UDP: a computed zero is sent as all ones; TCP takes either.
    struct.pack_into(">H", frame, place, value or 0xFFFF)


def segment(frame: bytes | bytearray, header: Header) -> Iterator[bytearray]:
    """The TCP segments of a large frame, each a whole frame with right checksums. Raises Malformed."""
    start = spec.ETHERNET_BYTES
    if frame[12:14] == _VLAN:
        start += spec.VLAN_BYTES
    ipv4 = header.gso_type == spec.GSO_TCPV4
    tcp = header.csum_start
    if tcp < start + (20 if ipv4 else 40) or tcp + 20 > len(frame) or header.csum_offset != _TCP_SUM:
        raise Malformed("TCP segmentation without room for its headers")
    data = tcp + 4 * (frame[tcp + 12] >> 4)
    if data < tcp + 20 or data > len(frame) or frame[start] >> 4 != (4 if ipv4 else 6):
        raise Malformed("TCP segmentation of what is no TCP")
    sequence = int.from_bytes(frame[tcp + _TCP_SEQ : tcp + _TCP_SEQ + 4], "big")
    identity = int.from_bytes(frame[start + _IP_ID : start + _IP_ID + 2], "big")
    flags = frame[tcp + _TCP_FLAGS]
    # The pseudo header's sum less its length, which is what changes from segment to segment.
    addresses = frame[start + 12 : start + 20] if ipv4 else frame[start + 8 : start + 40]
    pseudo = ones_sum(addresses) + 6
    size = header.gso_size
    # Each piece has a copy of the headers, so both bound what one frame can become.
    if size < _SEGMENT_MIN or data > start + _HEADERS_MAX:
        raise Malformed(f"segments of {size} bytes behind headers of {data - start}")
    for number, position in enumerate(range(data, max(len(frame), data + 1), size)):
        piece = bytearray(frame[:data]) + frame[position : position + size]
        last = position + size >= len(frame)
        if ipv4:
            struct.pack_into(">H", piece, start + _IP_TOTAL, len(piece) - start)
            struct.pack_into(">H", piece, start + _IP_ID, (identity + number) & 0xFFFF)
            struct.pack_into(">H", piece, start + _IP_SUM, 0)
            struct.pack_into(">H", piece, start + _IP_SUM, ~ones_sum(piece[start:tcp]) & 0xFFFF)
        else:
            struct.pack_into(">H", piece, start + 4, len(piece) - start - 40)
        struct.pack_into(">I", piece, tcp + _TCP_SEQ, (sequence + position - data) & 0xFFFFFFFF)
        piece[tcp + _TCP_FLAGS] = flags & ~((0 if last else _FIN | _PSH) | (_CWR if number else 0))
        folded = pseudo + len(piece) - tcp
        struct.pack_into(">H", piece, tcp + _TCP_SUM, folded % 0xFFFF)
        struct.pack_into(">H", piece, tcp + _TCP_SUM, ~ones_sum(memoryview(piece)[tcp:]) & 0xFFFF)
        yield piece
