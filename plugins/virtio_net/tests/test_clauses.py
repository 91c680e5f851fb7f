"""Clauses of virtio 1.4 for the network card, 5.1, that its other tests do not show."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_virtio_net import device as device_module
from qvm_virtio_net import header as headers
from qvm_virtio_net import offload, partial, spec
from qvm_virtio_net.buffers import fill
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.header import Header, Malformed
from qvm_virtio_net.hostdev import NoCable
from qvm_virtio_net.testing import MAC_A, MAC_B, PLAIN, Guest, ethernet, header

from qvmcore.api import ConfigError
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.virtio.split import SplitQueue

Card = Callable[..., Plugged[VirtioNet]]
Pair = Callable[..., tuple[Guest, Guest]]
TUNNEL_V4, TUNNEL_V6 = 0x20, 0x40


def tcp_frame(payload: bytes) -> tuple[bytes, bytes]:
    """(header for segments of 1000 bytes, IPv4 frame with the pseudo header's sum as its checksum)."""
    length = 20 + len(payload)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 7, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    ip = ip[:10] + struct.pack(">H", ~offload.ones_sum(ip) & 0xFFFF) + ip[12:]
    pseudo = offload.ones_sum(ip[12:20] + struct.pack(">HH", 6, length))
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 5, 6, 0x50, 0x10, 1024, pseudo, 0)
    frame = MAC_B + MAC_A + b"\x08\x00" + ip + tcp + payload
    return header(spec.HDR_NEEDS_CSUM, spec.GSO_TCPV4, 54, 1000, 34, 16), frame


# ---- configuration, 5.1.4.1 ------------------------------------------------------------------------


@pytest.mark.parametrize("mtu", [68, 1500, 65535])
def test_5_1_4_1_mtu_is_what_was_configured_and_never_changes(card: Card, mtu: int) -> None:
    device = card(none=True, mtu=mtu)
    for _ in range(2):
        guest = Guest(device)
        assert guest.driver.config(10, 2) == mtu
        guest.driver.write_config(10, 2, 1000)
        guest.command(spec.CTRL_MAC, spec.CTRL_MAC_ADDR_SET, MAC_B)
        device.vdev.link_changed()
        assert guest.driver.config(10, 2) == mtu


@pytest.mark.parametrize("mtu", [0, 67, 65536])
def test_5_1_4_1_an_mtu_out_of_range_is_refused(mtu: int) -> None:
    with pytest.raises(ConfigError, match="mtu"):
        plug(VirtioNet, none=True, mtu=mtu)


class Cables(NoCable):
    """A hostdev with several queues, as a tap: ``pairs`` are those it was told to spread over.

    ``waiting`` are the messages to be received, of each pair.
    """

    pairs = 0

    def __init__(self) -> None:
        self.waiting: dict[int, list[bytes]] = {}

    def receive(self, pair: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """The next message."""
        messages = self.waiting.get(pair, [])
        return fill([memoryview(each) for each in buffers], messages.pop(0)) if messages else 0

    def set_pairs(self, pairs: int) -> bool:
        """Taken down."""
        self.pairs = pairs
        return True


@pytest.fixture
def cables(monkeypatch: pytest.MonkeyPatch) -> Cables:
    """What the next card is plugged into, whatever its options say."""
    cables = Cables()
    monkeypatch.setattr(device_module, "make_hostdev", lambda *_: cables)
    return cables


@pytest.mark.parametrize("queues", [2, 8])
def test_5_1_4_1_max_virtqueue_pairs(card: Card, cables: Cables, queues: int) -> None:
    guest = Guest(card(tap="tq0", queues=queues))
    assert guest.driver.features & spec.F_MQ
    assert guest.driver.config(8, 2) == queues
    assert len(guest.driver.queues) == 2 * queues + 1


@pytest.mark.parametrize("queues", [0, 9, 0x8001])
def test_5_1_4_1_a_number_of_queues_out_of_range_is_refused(queues: int) -> None:
    with pytest.raises(ConfigError, match="queues"):
        plug(VirtioNet, tap="tq0", queues=queues)


# ---- transmission, 5.1.9.2.2 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        header(flags=0xF8),  # flags nobody knows
        header(start=0xFFFF, offset=0xFFFF),  # where a checksum would be, if one were asked for
        header(flags=0xF8, start=14, offset=0),
        header(hdr_len=0xFFFF, gso_size=0xFFFF),
    ],
    ids=["flags", "outside", "inside", "lengths"],
)
def test_5_1_9_2_2_what_no_flag_asks_for_is_not_used(pair: Pair, head: bytes) -> None:
    one, two = pair()
    two.offer(2000)
    one.send(ethernet(), head)
    assert two.received() == [(spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1), ethernet(), [12 + 60])]


def test_5_1_9_2_2_a_checksum_nobody_asked_for_stays_as_it_is(pair: Pair) -> None:
    """Right or wrong: the frame is the sender's."""
    one, two = pair(None, PLAIN)
    two.offer(2000)
    _, frame = tcp_frame(b"abc")
    wrong = frame[:50] + b"\xde\xad" + frame[52:]
    one.send(wrong)
    assert two.received() == [(spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1), wrong, [12 + len(wrong)])]


@pytest.mark.parametrize("hdr_len", [0, 1, 20, 0xFFFF])
def test_5_1_9_2_2_hdr_len_is_not_relied_on(pair: Pair, hdr_len: int) -> None:
    """Cut for a driver without TSO, the segments are the same whatever the sender says of its headers."""
    one, two = pair(None, PLAIN)
    head, frame = tcp_frame(bytes(range(250)) * 10)
    segments = []
    for told in (struct.unpack_from("<H", head, 2)[0], hdr_len):
        two.offer(*[2000] * 3)
        one.send(frame, head[:2] + struct.pack("<H", told) + head[4:])
        segments.append([data for _, data, _ in two.received()])
    assert segments[0] == segments[1]
    assert len(segments[0]) == 3


@pytest.mark.parametrize(
    ("flags", "gso_type"),
    [
        (1, 1 | TUNNEL_V4 | TUNNEL_V6),
        (0, 1 | TUNNEL_V4),
        (3, 1 | TUNNEL_V4),
        (1, TUNNEL_V6),
        (1, 1 | TUNNEL_V4),
        (9, 4 | TUNNEL_V6),
    ],
    ids=["both", "no-checksum", "data-valid", "no-kind", "not-agreed", "checksum-not-agreed"],
)
def test_5_1_9_2_2_and_5_1_9_4_1_a_tunnel_packet_is_not_accepted(
    pair: Pair, flags: int, gso_type: int
) -> None:
    one, two = pair()
    two.offer(*[4096] * 4)
    head, frame = tcp_frame(bytes(3000))
    one.send(frame, bytes([flags, gso_type]) + head[2:])
    one.send(ethernet())
    assert [data for _, data, _ in two.received()] == [ethernet()]
    assert two.stats.rx_malformed == 1


# ---- reception, 5.1.9.4.1 --------------------------------------------------------------------------


def test_5_1_9_4_1_the_buffers_of_a_frame_are_shown_together(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two stores of the used index a driver may poll: what it finds is a whole frame."""
    one, two = pair(None, PLAIN | spec.F_MRG_RXBUF)
    queue = two.device.vdev.virtio.queue(0)
    used = queue._used
    indices: list[int] = []

    class Watched:
        def __getitem__(self, place: int) -> int:
            return int(used[place])

        def __setitem__(self, place: int, value: int) -> None:
            used[place] = value
            if place == 1:
                indices.append(value)

    monkeypatch.setattr(queue, "_used", Watched())
    two.offer(*[100] * 20)
    one.send(ethernet(payload=bytes(250)))
    two.device.settle()
    one.send(ethernet(payload=bytes(500)))
    assert [len(used) for _, _, used in two.received()] == [3, 6]
    assert indices == [3, 9]


def packet(version: int = 4, protocol: int = 6, tag: bytes = b"", size: int = 100) -> tuple[bytearray, int]:
    """(frame of TCP or UDP with the pseudo header's sum as its checksum, where that header starts)."""
    header_bytes, place = (20, 16) if protocol == 6 else (8, 6)
    length = header_bytes + size
    if version == 4:
        ip = struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 20 + length, 7, 0x4000, 64, protocol, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
        )
        ip = ip[:10] + struct.pack(">H", ~offload.ones_sum(ip) & 0xFFFF) + ip[12:]
        addresses = ip[12:]
    else:
        ip = struct.pack(">IHBB", 6 << 28, length, protocol, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
        addresses = ip[8:]
    transport = bytearray(header_bytes) + bytes(range(size))
    if protocol == 6:
        transport[12] = 0x50
    pseudo = offload.ones_sum(addresses + struct.pack(">HH", protocol, length))
    struct.pack_into(">H", transport, place, pseudo)
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    front = MAC_B + MAC_A + tag + kind + ip
    return bytearray(front + transport), len(front)


def finished(frame: bytes, start: int, place: int) -> bytes:
    """With the checksum that the partial one stands for."""
    done = bytearray(frame)
    offload.finish_checksum(done, Header(1, 0, 0, 0, start, place))
    return bytes(done)


@pytest.mark.parametrize("tag", [b"", b"\x81\x00\x00\x05"], ids=["plain", "tagged"])
@pytest.mark.parametrize(("protocol", "place"), [(6, 16), (17, 6)], ids=["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("buffers", [[2000], [40] * 10], ids=["one", "many"])
def test_5_1_9_4_1_a_partial_checksum_that_was_validated_is_passed_on(
    pair: Pair, version: int, protocol: int, place: int, tag: bytes, buffers: list[int]
) -> None:
    one, two = pair(None, PLAIN | spec.F_MRG_RXBUF | spec.F_GUEST_CSUM)
    two.offer(*buffers)
    frame, start = packet(version, protocol, tag)
    one.send(frame, header(spec.HDR_NEEDS_CSUM, start=start, offset=place))
    ((got, data, used),) = two.received()
    assert got == spec.HEADER.pack(spec.HDR_NEEDS_CSUM, 0, 0, 0, start, place, len(used))
    assert data == frame
    assert two.stats.rx_finished == 0


#: What is wrong, as (bytes of the frame to change: offset -> value, csum_start, csum_offset).
UNSOUND: dict[str, tuple[int, dict[int, int], int, int]] = {
    "IPv4 checksum": (4, {24: 0xAA}, 34, 16),
    "IPv4 address": (4, {26: 0x0B}, 34, 16),
    "IPv4 header length": (4, {14: 0x46}, 34, 16),
    "IPv4 version": (4, {14: 0x65}, 34, 16),
    "pseudo header": (4, {50: 0xAA}, 34, 16),
    "another place": (4, {}, 34, 6),
    "another start": (4, {}, 36, 16),
    "inside the IP header": (4, {}, 20, 16),
    "no IP": (4, {12: 0x88, 13: 0xB5}, 34, 16),
    "IPv6 version": (6, {14: 0x40}, 54, 16),
    "IPv6 length": (6, {19: 0}, 54, 16),
    "IPv6 extension header": (6, {20: 0}, 54, 16),
    "IPv6 address": (6, {30: 1}, 54, 16),
}


@pytest.mark.parametrize("why", UNSOUND)
def test_5_1_9_4_1_any_other_partial_checksum_is_finished_and_nothing_is_claimed(
    pair: Pair, why: str
) -> None:
    """As on a wire: the driver looks at the checksum itself, and finds what is wrong."""
    version, changes, start, place = UNSOUND[why]
    one, two = pair(None, PLAIN | spec.F_MRG_RXBUF | spec.F_GUEST_CSUM)
    frame, _ = packet(version)
    for at, value in changes.items():
        frame[at] = value
    two.offer(2000)
    one.send(frame, header(spec.HDR_NEEDS_CSUM, start=start, offset=place))
    ((got, data, _),) = two.received()
    assert got == spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)
    assert data == finished(frame, start, place)
    assert two.stats.rx_finished == 1


@pytest.mark.parametrize(("more", "valid"), [(0x2000, False), (0x0001, False), (0x4000, True)])
def test_5_1_9_4_1_a_fragment_has_no_partial_checksum(pair: Pair, more: int, valid: bool) -> None:
    """More Fragments, a fragment's offset; Don't Fragment is no fragment."""
    one, two = pair(None, PLAIN | spec.F_MRG_RXBUF | spec.F_GUEST_CSUM)
    frame, start = packet()
    struct.pack_into(">H", frame, 20, more)
    struct.pack_into(">H", frame, 24, 0)
    struct.pack_into(">H", frame, 24, ~offload.ones_sum(frame[14:34]) & 0xFFFF)
    two.offer(2000)
    one.send(frame, header(spec.HDR_NEEDS_CSUM, start=start, offset=16))
    ((got, _, _),) = two.received()
    assert bool(got[0] & spec.HDR_NEEDS_CSUM) is valid


@pytest.mark.parametrize("options", [0, 4, 40])
@pytest.mark.parametrize("tag", [b"", b"\x81\x00\x00\x05"], ids=["plain", "tagged"])
def test_5_1_9_4_1_ip_options_are_part_of_the_header(pair: Pair, options: int, tag: bytes) -> None:
    """The header's length and version are believed only when they lead to the checksum told of."""
    one, two = pair()
    bare, start = packet(tag=tag)
    at = start - 20
    for first in (0x45 + options // 4, 0x45 + options // 4 + 1, 0x65 + options // 4):
        frame = bare[:start] + bytes([1]) * options + bare[start:]
        struct.pack_into(">H", frame, at + 2, len(frame) - at)
        frame[at] = first
        frame[at + 10 : at + 12] = b"\0\0"
        struct.pack_into(">H", frame, at + 10, ~offload.ones_sum(frame[at : start + options]) & 0xFFFF)
        two.offer(2000)
        one.send(frame, header(spec.HDR_NEEDS_CSUM, start=start + options, offset=16))
        ((got, _, _),) = two.received()
        assert bool(got[0] & spec.HDR_NEEDS_CSUM) is (first == 0x45 + options // 4)


def test_5_1_9_4_1_an_ipv6_header_has_40_bytes(pair: Pair) -> None:
    one, two = pair()
    frame, start = packet(6)
    frame[start:start] = bytes(8)
    two.offer(2000)
    one.send(frame, header(spec.HDR_NEEDS_CSUM, start=start + 8, offset=16))
    ((got, _, _),) = two.received()
    assert got == spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)


def test_5_1_9_4_1_a_checksum_inside_a_tunnel_is_finished(pair: Pair) -> None:
    """The outer checksums come first and nobody validated them."""
    one, two = pair()
    inner, start = packet()
    outer, _ = packet(protocol=17, size=8)
    struct.pack_into(">H", outer, 16, 28 + 8 + len(inner))
    frame = bytes(outer[:42]) + bytes(8) + bytes(inner)
    two.offer(2000)
    one.send(frame, header(spec.HDR_NEEDS_CSUM, start=50 + start, offset=16))
    ((got, data, _),) = two.received()
    assert got == spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)
    assert data == finished(frame, 50 + start, 16)


@pytest.mark.parametrize("broken", [24, 50], ids=["IPv4 checksum", "pseudo header"])
def test_5_1_9_4_1_segments_to_come_of_an_unsound_packet_are_cut_here(pair: Pair, broken: int) -> None:
    one, two = pair()
    head, frame = tcp_frame(bytes(2500))
    two.offer(*[2000] * 4)
    one.send(frame[:broken] + b"\xaa" + frame[broken + 1 :], head)
    messages = two.received()
    assert [got for got, _, _ in messages] == [spec.HEADER.pack(0, 0, 0, 0, 0, 0, 1)] * 3
    for _, data, _ in messages:
        length = len(data) - 34
        assert offload.ones_sum(data[14:34]) == 0xFFFF
        assert offload.ones_sum(data[26:34] + struct.pack(">HH", 6, length) + data[34:]) == 0xFFFF


def test_5_1_9_4_1_segments_to_come_of_another_kind_are_refused(pair: Pair) -> None:
    """TCP over IPv4 by the header, over IPv6 by the frame."""
    one, two = pair()
    frame, start = packet(6, size=2000 - 1900)
    two.offer(*[2000] * 4)
    one.send(frame, header(spec.HDR_NEEDS_CSUM, spec.GSO_TCPV4, start + 20, 1000, start, 16))
    assert two.received() == []
    assert two.stats.rx_malformed == 1


@given(
    base=st.tuples(st.sampled_from([4, 6]), st.sampled_from([6, 17]), st.sampled_from([b"", b"\x81\0\0\5"])),
    changes=st.dictionaries(st.integers(0, 90), st.integers(0, 255), max_size=3),
    size=st.integers(0, 200),
    cut=st.integers(0, 120),
    moved=st.tuples(
        st.integers(-2, 2) | st.integers(-60, 300), st.sampled_from([6, 16]) | st.integers(0, 300)
    ),
)
@settings(deadline=None, max_examples=500)
def test_5_1_9_4_1_what_is_passed_on_becomes_a_right_packet(
    base: tuple[int, int, bytes],
    changes: dict[int, int],
    size: int,
    cut: int,
    moved: tuple[int, int],
) -> None:
    """Any frame: what is called sound has a right checksum once the driver has finished it."""
    frame, start = packet(*base, size=size)
    for at, value in changes.items():
        if at < len(frame):
            frame[at] = value
    del frame[max(14, len(frame) - cut) :]
    start = max(0, start + moved[0])
    try:
        told = headers.parse(header(spec.HDR_NEEDS_CSUM, start=start, offset=moved[1]), len(frame))
    except Malformed:
        return
    if not partial.sound(bytes(frame[: partial.FRONT]), len(frame), told):
        return
    ip = 18 if frame[12:14] == b"\x81\0" else 14
    addresses = frame[ip + 12 : ip + 20] if frame[ip] >> 4 == 4 else frame[ip + 8 : ip + 40]
    protocol = frame[ip + 9] if frame[ip] >> 4 == 4 else frame[ip + 6]
    done = finished(bytes(frame), start, moved[1])[start:]
    assert offload.ones_sum(addresses + struct.pack(">HH", protocol, len(done)) + done) == 0xFFFF


# ---- control, 5.1.9.5 ------------------------------------------------------------------------------


@pytest.fixture
def when_used(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Any]]:
    """``when_used(look)``: what ``look()`` gives in the moment before each chain is given back."""

    def watch(look: Callable[[], Any]) -> list[Any]:
        seen: list[Any] = []
        push = SplitQueue.push

        def watched(self: SplitQueue, *arguments: Any) -> None:
            seen.append(look())
            push(self, *arguments)

        monkeypatch.setattr(SplitQueue, "push", watched)
        return seen

    return watch


#: The ring's own features keep out of the way: plain split rings, whose push is watched.
WATCHED = PLAIN | spec.F_CTRL_VQ | spec.F_CTRL_RX | spec.F_CTRL_MAC_ADDR | spec.F_MAC | spec.F_STATUS
WATCHED |= spec.F_GUEST_ANNOUNCE


def test_5_1_9_5_2_1_a_mac_table_is_in_force_before_its_command_is_used(
    card: Card, when_used: Callable[..., list[Any]]
) -> None:
    guest = Guest(card(none=True, mac=MAC_A.hex(":")), WATCHED)
    assert guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
    seen = when_used(lambda: guest.device.vdev.filter.accepts(ethernet(MAC_B)))
    table = struct.pack("<I6sI", 1, MAC_B, 0)
    assert guest.command(spec.CTRL_MAC, spec.CTRL_MAC_TABLE_SET, table)
    assert seen == [True]


def test_5_1_9_5_2_1_a_reset_empties_the_mac_table(card: Card) -> None:
    guest = Guest(card(none=True, mac=MAC_A.hex(":")))
    table = struct.pack("<I6sI", 1, MAC_B, 0)
    for before in (False, True):
        assert guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
        assert guest.device.vdev.filter.accepts(ethernet(MAC_B)) is before
        if not before:
            assert guest.command(spec.CTRL_MAC, spec.CTRL_MAC_TABLE_SET, table)
    guest = Guest(guest.device)
    assert guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
    assert not guest.device.vdev.filter.accepts(ethernet(MAC_B))


def test_5_1_9_5_2_1_the_mac_field_is_new_before_its_command_is_used(
    card: Card, when_used: Callable[..., list[Any]]
) -> None:
    guest = Guest(card(none=True, mac=MAC_A.hex(":")), WATCHED)
    seen = when_used(lambda: bytes(guest.driver.config(at, 1) for at in range(6)))
    assert guest.command(spec.CTRL_MAC, spec.CTRL_MAC_ADDR_SET, MAC_B)
    assert seen == [MAC_B]


def test_5_1_9_5_4_2_the_announce_bit_is_clear_before_its_acknowledgement_is_used(
    card: Card, when_used: Callable[..., list[Any]]
) -> None:
    guest = Guest(card(none=True), WATCHED)
    vdev = guest.device.vdev
    vdev._announce = True  # as after the cable came back
    vdev.virtio.config_changed()
    assert guest.status & spec.S_ANNOUNCE
    seen = when_used(lambda: guest.status & spec.S_ANNOUNCE)
    assert guest.command(spec.CTRL_ANNOUNCE, spec.CTRL_ANNOUNCE_ACK)
    assert seen == [0]


def test_5_1_9_5_6_2_a_reset_goes_back_to_the_first_pair(card: Card, cables: Cables) -> None:
    guest = Guest(card(tap="tq0", queues=4))
    for pairs in (3, 4):
        assert guest.command(spec.CTRL_MQ, spec.CTRL_MQ_VQ_PAIRS_SET, struct.pack("<H", pairs))
        assert cables.pairs == pairs
        guest.driver.reset()
        assert cables.pairs == 1
        guest = Guest(guest.device)
        assert cables.pairs == 1


def test_5_1_9_5_6_2_a_pair_switched_off_receives_nothing_any_more(card: Card, cables: Cables) -> None:
    """Neither frames that waited for its buffers, nor those that the host still has for it."""
    device = card(tap="tq0", queues=2, mac=MAC_B.hex(":"))
    guest = Guest(device)
    second = guest.driver.queues[2]
    big, small = bytes(12) + ethernet(payload=bytes(500)), bytes(12) + ethernet()

    def pairs(count: int) -> None:
        assert guest.command(spec.CTRL_MQ, spec.CTRL_MQ_VQ_PAIRS_SET, struct.pack("<H", count))

    def arrive(*messages: bytes) -> None:
        cables.waiting[1] = list(messages)
        device.ctx.worker.call(lambda: device.vdev.readable(1))
        device.settle()

    def offer(count: int, size: int) -> None:
        for _ in range(count):
            second.add([], [size])
        second.kick()
        device.settle()

    pairs(2)
    offer(1, 100)
    arrive(big)  # it is taken, and waits for more buffers than the one
    assert second.reap() == []
    pairs(1)
    assert guest.stats.rx_no_buffer == 1
    offer(4, 1000)
    arrive(small, small)
    assert second.reap() == []
    assert cables.waiting[1] == []
    assert guest.stats.rx_no_driver == 2
    pairs(2)
    arrive(small)
    (request,) = second.reap()
    assert request.result()[12 : request.length] == ethernet()


def test_5_1_9_5_6_2_the_second_pair_waits_for_its_command(card: Card, cables: Cables) -> None:
    device = card(tap="tq0", queues=2, mac=MAC_B.hex(":"))
    for _ in range(2):
        guest = Guest(device)
        second = guest.driver.queues[2]
        second.add([], [1000])
        cables.waiting[1] = [bytes(12) + ethernet()]
        second.kick()
        device.settle()
        assert second.reap() == []
        assert guest.command(spec.CTRL_MQ, spec.CTRL_MQ_VQ_PAIRS_SET, struct.pack("<H", 2))
        device.settle()
        assert len(second.reap()) == 1
        guest.driver.reset()
