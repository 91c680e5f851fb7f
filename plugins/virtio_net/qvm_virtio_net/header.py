"""The header before each frame (struct virtio_net_hdr, virtio 1.4, 5.1.9): checked before it is believed.

A frame from another VM carries the header its driver wrote. It may say anything, so the receiving
side checks it against the frame, and makes it what its own driver agreed to.
"""

from __future__ import annotations

from typing import NamedTuple

from qvm_virtio_net import spec


class Malformed(ValueError):
    """The header does not fit the frame; the text says why."""


class Header(NamedTuple):
    """The fields that mean something to a receiver; offsets in bytes from the start of the frame."""

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int

    def pack(self, buffers: int) -> bytes:
        """The 12 bytes, with the number of buffers the frame is spread over."""
        return spec.HEADER.pack(*self, buffers)


#: Nothing is left to be done to the frame.
PLAIN = Header(0, spec.GSO_NONE, 0, 0, 0, 0)
_GSO_OFFLOAD = {spec.GSO_TCPV4: spec.F_GUEST_TSO4, spec.GSO_TCPV6: spec.F_GUEST_TSO6}


def parse(data: bytes | bytearray | memoryview, frame_bytes: int) -> Header:
    """The header at the start of ``data``, for a frame of this length. Raises Malformed.

    Flags nobody knows are dropped (5.1.9.2.2), and DATA_VALID with them: nobody here looked at the
    checksum, and another VM's word for it is worth nothing (5.1.9.4.1). What it says of offsets lies
    inside the frame.
    """
    flags, gso_type, hdr_len, gso_size, start, offset, _ = spec.HEADER.unpack_from(data)
    if not flags and not gso_type:
        return PLAIN
    flags &= spec.HDR_NEEDS_CSUM
    if gso_type not in (spec.GSO_NONE, spec.GSO_TCPV4, spec.GSO_TCPV6):
        raise Malformed(f"gso_type {gso_type:#x} was not agreed")
    if flags & spec.HDR_NEEDS_CSUM:
        if start + offset + 2 > frame_bytes:
            raise Malformed(f"checksum at {start}+{offset} of a frame of {frame_bytes} bytes")
    else:
        start = offset = 0
    if gso_type == spec.GSO_NONE:
        return Header(flags, gso_type, 0, 0, start, offset)
    # 5.1.9.2.1: segmentation comes with a partial checksum and a segment size.
    if not flags & spec.HDR_NEEDS_CSUM or not gso_size:
        raise Malformed("segmentation without a checksum or a size")
    return Header(flags, gso_type, min(hdr_len, frame_bytes), gso_size, start, offset)


def acceptable(header: Header, offloads: int) -> bool:
    """Whether a driver with these guest offloads may be given the header as it is (5.1.9.4.1)."""
    if header is PLAIN:
        return True
    if header.flags & spec.HDR_NEEDS_CSUM and not offloads & spec.F_GUEST_CSUM:
        return False
    return header.gso_type == spec.GSO_NONE or bool(offloads & _GSO_OFFLOAD[header.gso_type])


def trimmed(header: Header, offloads: int) -> Header:
    """Without flags for a driver that did not negotiate GUEST_CSUM (5.1.9.4.1)."""
    return header if offloads & spec.F_GUEST_CSUM or header is PLAIN else header._replace(flags=0)
