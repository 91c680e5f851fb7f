"""Targets for virtio-net: what comes from another VM, and what its own driver says on the control queue."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qvmcore.testing.fakes import plug
from tests.fuzz.bytesource import ByteSource

if TYPE_CHECKING:
    from qvm_virtio_net.filter import RxFilter

FRAME_MAX = 2048


@cache
def _folder() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    keep = tempfile.TemporaryDirectory(prefix="qvm-fuzz-")
    return keep, Path(keep.name)


def hello(data: bytes) -> None:
    """The first message of a stranger: a hello that can be judged, or a ValueError."""
    from qvm_virtio_net.hello import VERSION, Hello, decode, encode, refusal, warnings

    own = Hello(VERSION, "lan0", "vm", "net0", "02:00:00:00:00:01", 1500)
    try:
        other = decode(data)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(refusal(own, other), str)
    assert all(warnings(own, other))
    assert decode(encode(other)) == other


def frame(data: bytes) -> None:
    """Any header on any frame is refused, or finished within the frame; segments are the data."""
    from qvm_virtio_net import spec
    from qvm_virtio_net.header import Malformed, acceptable, parse, trimmed
    from qvm_virtio_net.offload import finish_checksum, segment

    source = ByteSource(data)
    flags, kind = source.byte(), source.pick((0, 0, 1, 4, 3, 0x81))
    numbers = (source.value(2), source.value(2), source.value(2), source.value(2))
    offloads = source.pick((0, spec.OFFLOADS, spec.F_GUEST_CSUM))
    whole = _frame(source)
    try:
        header = parse(spec.HEADER.pack(flags, kind, *numbers, 0), len(whole))
        if acceptable(header, offloads):
            trimmed(header, offloads).pack(1)
            return
        if header.gso_type == spec.GSO_NONE:
            before = len(whole)
            finish_checksum(whole, header)
            assert len(whole) == before
            return
        pieces = list(itertools.islice(segment(whole, header), 4096))
    except Malformed as error:
        assert str(error)
        return
    assert 0 < len(pieces) <= 2049
    start = header.csum_start + 4 * (whole[header.csum_start + 12] >> 4)
    assert b"".join(bytes(piece[start:]) for piece in pieces) == whole[start:]


def _frame(source: ByteSource) -> bytearray:
    """An Ethernet frame of any bytes, often TCP over IP."""
    kind = source.byte() % 3
    if kind == 0:
        return bytearray(source.rest()[:FRAME_MAX].ljust(14, b"\0"))
    ip = bytes([0x45]) + bytes(19) if kind == 1 else bytes([0x60]) + bytes(39)
    tcp = bytes(12) + bytes([source.byte()]) + bytes(7)
    return bytearray(bytes(12) + (b"\x08\x00", b"\x86\xdd")[kind - 1] + ip + tcp + source.rest())


class _Card:
    """What the control queue acts upon."""

    def __init__(self, rx_filter: RxFilter) -> None:
        self.filter = rx_filter

    def set_mac(self, mac: bytes) -> None:
        assert len(mac) == 6 and not mac[0] & 1

    def acknowledge_announce(self) -> None:
        """Nothing to clear."""

    def set_pairs(self, pairs: int) -> bool:
        return 1 <= pairs <= 4

    def set_guest_offloads(self, offloads: int) -> bool:
        return True


def control(data: bytes) -> None:
    """Any commands with any features: accepted or refused, a refused one changes nothing."""
    from qvm_virtio_net.ctrl import execute
    from qvm_virtio_net.filter import RxFilter

    source = ByteSource(data)
    features = (1 << 64) - 1 if source.byte() & 3 else source.uint(8)
    card = _Card(RxFilter(b"\x02\0\0\0\0\1"))
    if source.byte() & 1:
        card.filter.filter_vlans()
    while source:
        command = bytes([source.byte() % 7, source.byte() % 8]) + _argument(source)
        before = card.filter.report()
        if not execute(command, features, card):
            assert card.filter.report() == before
        assert isinstance(card.filter.accepts(source.take(18).ljust(18, b"\0")), bool)


def _argument(source: ByteSource) -> bytes:
    kind = source.byte() % 4
    if kind == 0:
        return source.take(source.byte() % 10)
    if kind == 1:
        return bytes([source.byte() & 3])
    if kind == 2:
        return source.value(2).to_bytes(2, "little")
    counts = (source.value(4), source.byte() % 4)
    return b"".join(struct.pack("<I", count) + source.take(6 * (count % 8)) for count in counts)


def peer(data: bytes) -> None:
    """The other end of a cable is no qvm: hellos, frames and silence of any kind; the card lives."""
    from qvm_virtio_net import spec
    from qvm_virtio_net.device import VirtioNet
    from qvm_virtio_net.hello import VERSION, Hello, encode

    source = ByteSource(data)
    path = _folder()[1] / "link"
    good = encode(Hello(VERSION, path.name, "stranger", "net9", "02:00:00:00:00:99", 1500))
    with plug(VirtioNet, {"peer": str(path)}, base_dir=path.parent) as card, contextlib.ExitStack() as stack:
        card.settle()
        driver = card.driver()
        driver.start(None if source.byte() & 1 else 1 << 32)
        end: socket.socket | None = None
        while source:
            action = source.byte() % 8
            if action == 0 or end is None:
                end = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                end.setblocking(False)
                with contextlib.suppress(OSError):
                    end.connect(os.fspath(path))
                    end.send(good if source.byte() & 3 else source.take(source.byte()))
            elif action == 1:
                end.close()
                end = None
            elif action == 2:
                with contextlib.suppress(MemoryError):
                    driver.queues[0].submit([], [source.pick((12, 60, 1526, 4096))])
            elif action == 3:
                with contextlib.suppress(MemoryError):
                    driver.queues[1].submit([bytes(12), source.take(64)], [])
            elif action == 4:
                card.settle()
            else:
                flags, kind = source.pick((0, 1, 2, 3)), source.pick((0, 1, 4, 9))
                numbers = (source.value(2), source.value(2), source.value(2), source.value(2))
                head = spec.HEADER.pack(flags, kind, *numbers, source.byte())
                message = head + bytes(_frame(ByteSource(source.take(source.byte()))))
                with contextlib.suppress(OSError):
                    end.send(message[: None if source.byte() & 7 else source.byte()])
        card.settle()
        assert card.ctx.faults == [], card.ctx.faults
        assert card.ctx.shutdowns == []
        assert [result for result in card.terminate() if result.verdict != "ok"] == []
