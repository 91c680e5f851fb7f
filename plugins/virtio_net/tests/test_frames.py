"""Frames between two cards on one cable: buffers, offloads, back-pressure (virtio 1.4, 5.1.9)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qvm_virtio_net import header as headers
from qvm_virtio_net import offload, patience, spec
from qvm_virtio_net.header import Malformed
from qvm_virtio_net.testing import MAC_A, MAC_B, Guest, ethernet, header

from qvmcore.testing.driver import Piece
from qvmcore.virtio.spec import DEVICE_NEEDS_RESET

Pair = Callable[..., tuple[Guest, Guest]]
Until = Callable[[Callable[[], Any]], None]
BASE = 1 << 32


def tcp_frame(payload: bytes, version: int = 4) -> tuple[bytes, bytes]:
    """(header for segments of 1000 bytes, frame) as Linux offers a large TCP send."""
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 0xFFFFFF00, 5, 0x50, 0x19, 1024, 0, 0)
    if version == 4:
        ip = struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 7, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
        )
        ip = ip[:10] + struct.pack(">H", ~offload.ones_sum(ip) & 0xFFFF) + ip[12:]
        start, kind, gso = 34, 0x0800, spec.GSO_TCPV4
        pseudo = offload.ones_sum(ip[12:20] + struct.pack(">HH", 6, 20 + len(payload)))
    else:
        ip = struct.pack(">IHBB", 6 << 28, 20 + len(payload), 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
        start, kind, gso = 54, 0x86DD, spec.GSO_TCPV6
        pseudo = offload.ones_sum(ip[8:40] + struct.pack(">HH", 6, 20 + len(payload)))
    tcp = tcp[:16] + struct.pack(">H", pseudo) + tcp[18:]
    frame = MAC_B + MAC_A + struct.pack(">H", kind) + ip + tcp + payload
    return header(spec.HDR_NEEDS_CSUM, gso, start + 20, 1000, start, 16), frame


@pytest.mark.parametrize(
    ("sizes", "frame_bytes", "used"),
    [
        ([2000], 60, [72]),
        ([72], 60, [72]),
        ([40, 40, 2000], 60, [40, 32]),
        ([40, 32, 2000], 60, [40, 32]),
        ([12, 12, 12, 12, 12, 12, 2000], 60, [12] * 6),
        ([31, 2000], 60, [31, 41]),
        ([29, 2000], 60, [29, 43]),
        ([100] * 20, 1500, [100] * 15 + [12]),
    ],
)
def test_5_1_9_4_1_num_buffers_and_full_buffers(
    pair: Pair, sizes: list[int], frame_bytes: int, used: list[int]
) -> None:
    one, two = pair()
    two.offer(*sizes)
    frame = ethernet(payload=bytes(range(256)) * 6)[:frame_bytes]
    one.send(frame)
    two.device.settle()
    assert two.received() == [(spec.HEADER.pack(0, 0, 0, 0, 0, 0, len(used)), frame, used)]
    assert one.stats.tx_frames == two.stats.rx_frames == 1
    assert one.stats.tx_bytes == two.stats.rx_bytes == frame_bytes


def test_5_1_9_4_1_without_mergeable_buffers_one_each(pair: Pair) -> None:
    one, two = pair(None, BASE)
    two.offer(100, 2000)
    one.send(ethernet(payload=bytes(200)))
    one.send(ethernet(payload=b"first"))
    one.send(ethernet(payload=bytes(200)))
    messages = two.received()
    # Each frame has one buffer, the next in order; the first was too small for the first.
    assert [message[1] for message in messages] == [ethernet(payload=b"first"), ethernet(payload=bytes(200))]
    assert two.stats.rx_no_buffer == 1
    assert {message[0] for message in messages} == {spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)}


def test_5_1_9_3_1_a_receive_buffer_too_small_for_a_header_needs_a_reset(pair: Pair) -> None:
    one, two = pair()
    two.offer(11)
    one.send(ethernet())
    two.device.settle()
    assert two.driver.needs_reset and not two.device.ctx.faults
    two.driver.start()
    assert not two.driver.needs_reset


@pytest.mark.parametrize("version", [4, 6])
def test_5_1_9_4_a_large_segment_crosses_whole(pair: Pair, version: int) -> None:
    one, two = pair()
    head, frame = tcp_frame(bytes(range(256)) * 200, version)
    two.offer(*[4096] * 17)
    one.send(frame, head)
    ((got, data, used),) = two.received()
    assert data == frame and len(used) == -(-(12 + len(frame)) // 4096)
    assert got == head[:10] + struct.pack("<H", len(used))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("payload", [0, 1, 999, 1000, 1001, 5500])
def test_5_1_9_4_1_a_large_segment_is_cut_for_a_driver_without_tso(
    pair: Pair, version: int, payload: int
) -> None:
    one, two = pair(None, BASE | spec.F_MRG_RXBUF)
    text = bytes(i * 7 & 0xFF for i in range(payload))
    head, frame = tcp_frame(text, version)
    two.offer(*[2000] * 10)
    one.send(frame, head)
    messages = two.received()
    start = 34 if version == 4 else 54
    assert b"".join(message[1][start + 20 :] for message in messages) == text
    assert len(messages) == max(1, -(-payload // 1000))
    for number, (got, data, _) in enumerate(messages):
        assert got == spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)
        length = len(data) - start
        if version == 4:
            assert offload.ones_sum(data[14:34]) == 0xFFFF and data[16:18] == struct.pack(">H", length + 20)
            pseudo = data[26:34]
        else:
            assert data[18:20] == struct.pack(">H", length)
            pseudo = data[22:54]
        assert offload.ones_sum(pseudo + struct.pack(">HH", 6, length) + data[start:]) == 0xFFFF
        assert data[start + 4 : start + 8] == struct.pack(">I", (0xFFFFFF00 + 1000 * number) & 0xFFFFFFFF)
        assert data[start + 13] == (0x19 if number == len(messages) - 1 else 0x10)


def test_5_1_9_4_1_a_checksum_is_finished_for_a_driver_without_csum(pair: Pair) -> None:
    one, two = pair(None, BASE)
    two.offer(2000)
    _, frame = tcp_frame(b"abc")
    one.send(frame, header(spec.HDR_NEEDS_CSUM, start=34, offset=16))
    ((got, data, _),) = two.received()
    assert got == spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)
    assert offload.ones_sum(data[26:34] + struct.pack(">HH", 6, 23) + data[34:]) == 0xFFFF


def test_5_1_9_4_1_flags_are_zero_for_a_driver_without_csum(pair: Pair) -> None:
    one, two = pair(None, BASE)
    two.offer(2000)
    one.send(ethernet(), header(spec.HDR_DATA_VALID))
    assert two.received()[0][0] == spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)


def test_5_1_9_4_1_another_vms_word_for_a_checksum_is_not_passed_on(pair: Pair) -> None:
    one, two = pair()
    two.offer(2000)
    one.send(ethernet(), header(spec.HDR_DATA_VALID))
    assert two.received()[0][0] == spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)


@pytest.mark.parametrize(("size", "start"), [(1, 34), (47, 34), (1000, 2000), (1000, 13), (1000, 33)])
def test_what_one_segment_may_become_is_bounded(pair: Pair, size: int, start: int) -> None:
    """Each piece repeats the headers: tiny pieces or endless headers would be gigabytes."""
    one, two = pair(None, BASE | spec.F_MRG_RXBUF)
    _, frame = tcp_frame(bytes(b"\x50" * 60000))
    two.offer(2000)
    one.send(frame, header(spec.HDR_NEEDS_CSUM, spec.GSO_TCPV4, 0, size, start, 16))
    assert not two.received() and two.stats.rx_malformed == 1


def test_5_1_9_5_9_offloads_switched_off_are_finished_here(pair: Pair) -> None:
    one, two = pair()
    assert two.command(spec.CTRL_GUEST_OFFLOADS, spec.CTRL_GUEST_OFFLOADS_SET, bytes(8))
    two.offer(*[2000] * 10)
    head, frame = tcp_frame(bytes(3000))
    one.send(frame, head)
    assert len(two.received()) == 3


@pytest.mark.parametrize("frame_bytes", [0, 1, 13, 1519, 9000, spec.FRAME_BYTES_MAX + 1])
def test_5_1_4_1_frames_of_a_wrong_length_are_dropped_and_counted(pair: Pair, frame_bytes: int) -> None:
    one, two = pair()
    request = one.send(bytes(frame_bytes), bytes(12) if frame_bytes else bytes(11))
    assert request.done and one.stats.tx_malformed == 1
    two.offer(2000)
    one.send(ethernet())
    assert [message[1] for message in two.received()] == [ethernet()]


def test_5_1_4_1_a_tagged_frame_may_be_four_bytes_longer(pair: Pair) -> None:
    one, two = pair()
    two.offer(2000, 2000)
    frame = MAC_B + MAC_A + b"\x81\x00\x00\x01\x08\x00" + bytes(1500)
    one.send(frame)
    one.send(MAC_B + MAC_A + b"\x08\x00" + bytes(1504))
    assert [message[1] for message in two.received()] == [frame]
    assert two.stats.rx_malformed == 1


def test_frames_for_others_are_filtered(pair: Pair) -> None:
    one, two = pair()
    two.offer(2000, 2000)
    two.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
    one.send(ethernet(MAC_A))
    one.send(ethernet(MAC_B))
    assert [message[1] for message in two.received()] == [ethernet(MAC_B)]
    assert two.stats.rx_filtered == 1


def test_without_a_driver_frames_are_lost_and_hold_nobody_up(pair: Pair, until: Until) -> None:
    one, two = pair()
    two.driver.reset()
    for _ in range(50):
        assert one.send(ethernet()).done
    until(lambda: two.stats.rx_no_driver == 50)


def test_back_pressure_then_drops_are_counted(
    pair: Pair, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver without buffers holds the sender back; after the patience both sides drop, nothing stops."""
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    one, two = pair()
    head, frame = tcp_frame(bytes(60000))
    sent = 0
    piece = one.driver.ram.put(head + frame)
    while one.tx.in_flight < 200 and sent < 1000:
        one.tx.add_pieces([Piece(piece, 12 + len(frame))], [])
        sent += 1
        one.tx.kick()
        if sent % 20 == 0:
            one.device.settle()
            one.tx.reap()
    until(lambda: one.tx.reap() is not None and not one.tx.in_flight)
    stats = one.stats
    assert stats.tx_frames + stats.tx_stalled == sent
    until(lambda: two.stats.rx_no_buffer == stats.tx_frames)
    two.offer(*[2000] * 100)
    one.send(ethernet(payload=b"alive"))
    until(lambda: two.stats.rx_frames)
    assert two.received()[0][1] == ethernet(payload=b"alive")


def test_a_frame_waits_for_buffers_within_the_patience(
    pair: Pair, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 600.0)
    one, two = pair()
    for number in range(5):
        one.send(ethernet(payload=bytes([number])))
    two.device.settle()
    two.offer(60)
    assert not two.received()
    two.offer(*[100] * 10)
    until(lambda: two.stats.rx_frames == 5)
    assert [message[1][14] for message in two.received()] == [0, 1, 2, 3, 4]
    assert not two.stats.rx_no_buffer


def test_2_6_1_a_reset_receive_queue_keeps_none_of_its_buffers(pair: Pair) -> None:
    one, two = pair()
    two.offer(*[2000] * 4)
    one.send(ethernet(payload=b"first"))
    assert len(two.received()) == 1
    old = [two.driver.ram.memory.read(piece.address, 64) for piece in _buffers(two)]
    two.driver.reset_queue(0)
    for _ in range(3):
        one.send(ethernet(payload=b"nobody takes this"))
    two.device.settle()
    assert [two.driver.ram.memory.read(piece.address, 64) for piece in _buffers(two)] == old
    two.rx = two.driver.setup_queue(0, 16)
    two.offer(2000)
    one.send(ethernet(payload=b"second"))
    assert [message[1] for message in two.received()][-1] == ethernet(payload=b"second")


def _buffers(guest: Guest) -> list[Any]:
    return [piece for request in guest.rx._requests.values() for piece in request.writable]


_SHORT = st.integers(0, 200) | st.integers(0, 0xFFFF)


@given(
    kind=st.tuples(st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 4, 5, 0x81, 0xFF])),
    fields=st.tuples(_SHORT, _SHORT, _SHORT, _SHORT),
    frame_bytes=st.integers(14, 200) | st.integers(14, 70000),
)
@settings(deadline=None, max_examples=300)
def test_5_1_9_2_2_any_header_is_refused_or_lies_inside_the_frame(
    kind: tuple[int, int], fields: tuple[int, int, int, int], frame_bytes: int
) -> None:
    try:
        found = headers.parse(header(*kind, *fields), frame_bytes)
    except Malformed:
        return
    assert found.flags & ~3 == 0 and found.gso_type in (0, 1, 4) and found.hdr_len <= frame_bytes
    if found.flags & 1:
        assert found.csum_start + found.csum_offset + 2 <= frame_bytes
    if found.gso_type:
        assert found.flags & 1 and found.gso_size


@given(
    frame=st.binary(min_size=14, max_size=300),
    fields=st.tuples(
        st.integers(0, 320), st.integers(0, 20), st.integers(1, 300) | st.just(48), st.sampled_from([0, 1, 4])
    ),
)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_software_offloads_survive_any_frame(frame: bytes, fields: tuple[int, int, int, int]) -> None:
    start, offset, size, gso_type = fields
    try:
        found = headers.parse(header(1, gso_type, 0, size, start, offset), len(frame))
        if gso_type:
            pieces = list(offload.segment(frame, found))
            assert len(pieces) <= 7 and all(len(piece) <= len(frame) for piece in pieces)
        else:
            data = bytearray(frame)
            offload.finish_checksum(data, found)
            assert len(data) == len(frame)
    except Malformed:
        return


@given(st.binary(max_size=300))
def test_the_ones_complement_sum_is_that_of_rfc_1071(data: bytes) -> None:
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) & 1)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert offload.ones_sum(data) == total


def test_buffers_in_stock_are_given_back_before_guest_memory_moves(pair: Pair) -> None:
    one, two = pair()
    state = two.device.vdev.virtio
    two.offer(*[2000] * 60)
    held: list[int] = []
    for number in range(3):
        # A frame makes the card look for buffers ahead, for the longest that may come.
        one.send(ethernet(payload=b"%d" % number))
        one.device.settle()
        two.device.settle()
        queue = state.queue(0)
        assert queue is not None and queue.in_hand
        state.remap(partial(lambda queue: held.append(queue.in_hand), queue))
    assert held == [0, 0, 0]
    assert not state.status & DEVICE_NEEDS_RESET
    assert [frame[14:15] for _, frame, _ in two.received()] == [b"0", b"1", b"2"]
