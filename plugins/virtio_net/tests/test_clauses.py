"""Clauses of virtio 1.4 for the network card, 5.1, that its other tests do not show."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from qvm_virtio_net import device as device_module
from qvm_virtio_net import offload, spec
from qvm_virtio_net.device import VirtioNet
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
    """A hostdev with several queues, as a tap: ``pairs`` are those it was told to spread over."""

    pairs = 0

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
