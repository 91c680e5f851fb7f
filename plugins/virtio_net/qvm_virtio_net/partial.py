"""Whether an unfinished checksum may be passed on as such (virtio 1.4, 5.1.9.4.1).

A driver that is told NEEDS_CSUM takes the frame as right: it looks at no checksum of it again. So
this is said only of what was looked at here: TCP or UDP directly behind an IPv4 header whose own
checksum is right, or behind IPv6, with the sum of the right pseudo header in the place of the
checksum. Everything else is finished by :mod:`qvm_virtio_net.offload`, and the driver checks it.
"""

from __future__ import annotations

from qvm_virtio_net import spec
from qvm_virtio_net.header import Header
from qvm_virtio_net.offload import ones_sum

_IPV4, _IPV6, _VLAN = b"\x08\x00", b"\x86\xdd", b"\x81\x00"
_TCP, _UDP = 6, 17
#: Where the checksum is in the header of a protocol.
_CSUM_OFFSET = {_TCP: 16, _UDP: 6}
_GSO_KIND = {spec.GSO_TCPV4: (_IPV4, _TCP), spec.GSO_TCPV6: (_IPV6, _TCP)}
_MORE_FRAGMENTS_OR_OFFSET = 0x3FFF
#: The bytes of a frame that are looked at: a tag, the longest IPv4 header, TCP up to its checksum.
FRONT = spec.ETHERNET_BYTES + spec.VLAN_BYTES + 60 + 18


def sound(front: bytes, frame_bytes: int, header: Header) -> bool:
    """Whether the partial checksum of a frame is that of a packet all right so far.

    ``front`` are the first FRONT bytes, fewer of a shorter frame; ``header`` was parsed, so the
    checksum lies inside the frame.
    """
    start = spec.ETHERNET_BYTES
    kind = front[12:14]
    if kind == _VLAN:
        start += spec.VLAN_BYTES
        kind = front[16:18]
    transport = header.csum_start
    inner = transport - start
    if kind == _IPV4 and 20 <= inner <= 60:
        if (
            front[start] != 0x40 | inner >> 2
            or inner & 3
            or _word(front, start + 6) & _MORE_FRAGMENTS_OR_OFFSET
        ):
            return False
        if ones_sum(front[start:transport]) != 0xFFFF:
            return False
        protocol = front[start + 9]
        length = _word(front, start + 2) - inner
        addresses = front[start + 12 : start + 20]
    elif kind == _IPV6 and inner == 40 and front[start] >> 4 == 6:
        protocol = front[start + 6]
        length = _word(front, start + 4)
        addresses = front[start + 8 : transport]
    else:
        return False
    if _CSUM_OFFSET.get(protocol) != header.csum_offset or length != frame_bytes - transport:
        return False
    if header.gso_type != spec.GSO_NONE and _GSO_KIND[header.gso_type] != (kind, protocol):
        return False
    pseudo = ones_sum(addresses) + protocol + length
    return (pseudo - _word(front, transport + header.csum_offset)) % 0xFFFF == 0


def _word(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]
