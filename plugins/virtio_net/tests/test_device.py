"""The card itself: configuration, features, control queue, filter (virtio 1.4, 5.1)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_virtio_net import spec
from qvm_virtio_net.ctrl import execute
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.filter import TABLE_MAX, RxFilter
from qvm_virtio_net.mac import stable_mac
from qvm_virtio_net.testing import MAC_A, MAC_B, Guest, ethernet

from qvmcore.testing.driver import FeaturesRefused
from qvmcore.testing.fakes import Plugged

Card = Callable[..., Plugged[VirtioNet]]
MULTI = bytes.fromhex("01005e000001")
BASE = 1 << 32


def test_5_1_4_configuration(card: Card) -> None:
    guest = Guest(card(none=True, mac="02:00:00:00:00:0a", mtu=9000))
    config = bytes(guest.driver.config(i, 1) for i in range(12))
    assert struct.unpack("<6sHHH", config) == (MAC_A, 0, 1, 9000)
    guest.driver.write_config(0, 1, 0xFF)
    assert guest.driver.config(0, 1) == 2


def test_a_generated_address_is_stable_local_and_unicast() -> None:
    made = stable_mac("vm", "net0")
    assert made == stable_mac("vm", "net0") and len(made) == 6
    assert made != stable_mac("vm", "net1") and made != stable_mac("vm2", "net0")
    assert made[0] & 3 == 2


@pytest.mark.parametrize(("name", "bit", "needed", "needed_bit"), spec.REQUIRES)
def test_5_1_3_1_feature_dependencies(card: Card, name: str, bit: int, needed: str, needed_bit: int) -> None:
    device = card(peer="./lan0")
    if device.vdev.device_features() & bit:
        with pytest.raises(FeaturesRefused):
            Guest(device, BASE | bit)
    assert Guest(device, BASE | bit | needed_bit).driver.features
    assert name in device.vdev.refuse_features(bit) and needed in device.vdev.refuse_features(bit)


def test_5_1_3_offloads_only_where_the_hostdev_can(card: Card) -> None:
    assert card(none=True).vdev.device_features() & (spec.OFFLOADS | spec.F_MQ) == 0
    assert card(peer="./lan0").vdev.device_features() & spec.OFFLOADS == spec.OFFLOADS


def test_5_1_9_5_1_rx_modes(card: Card) -> None:
    guest = Guest(card(none=True))
    modes = guest.device.vdev.filter
    for which, name in enumerate(("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")):
        for value in (1, 0):
            assert guest.command(spec.CTRL_RX, which, bytes([value]))
            assert getattr(modes, name) is bool(value)


def test_5_1_9_5_2_mac_table_and_address(card: Card) -> None:
    guest = Guest(card(none=True, mac="02:00:00:00:00:0a"))
    vdev = guest.device.vdev
    assert guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
    assert not vdev.filter.accepts(ethernet(MAC_B)) and vdev.filter.accepts(ethernet(MAC_A))
    table = struct.pack("<I6sI6s", 1, MAC_B, 1, MULTI)
    assert guest.command(spec.CTRL_MAC, spec.CTRL_MAC_TABLE_SET, table)
    assert vdev.filter.accepts(ethernet(MAC_B)) and vdev.filter.accepts(ethernet(MULTI))
    before = guest.driver.generation()
    assert guest.command(spec.CTRL_MAC, spec.CTRL_MAC_ADDR_SET, MAC_B)
    assert bytes(guest.driver.config(i, 1) for i in range(6)) == MAC_B
    assert guest.driver.generation() != before
    assert not vdev.filter.accepts(ethernet(MAC_A))
    guest.driver.start()
    assert bytes(guest.driver.config(i, 1) for i in range(6)) == MAC_A
    assert vdev.filter.accepts(ethernet(MULTI)) and vdev.filter.promisc


def test_5_1_9_5_2_a_long_table_lets_all_of_its_kind_pass(card: Card) -> None:
    guest = Guest(card(none=True))
    guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
    many = TABLE_MAX + 1
    table = struct.pack("<I", many) + bytes(6 * many) + struct.pack("<I", 0)
    assert guest.command(spec.CTRL_MAC, spec.CTRL_MAC_TABLE_SET, table)
    assert guest.device.vdev.filter.accepts(ethernet(MAC_B))
    assert not guest.device.vdev.filter.accepts(ethernet(MULTI))


def test_5_1_9_5_3_vlans(card: Card) -> None:
    guest = Guest(card(none=True, mac="02:00:00:00:00:0b"))
    guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
    accepts = guest.device.vdev.filter.accepts
    tagged = MAC_B + MAC_A + b"\x81\x00\x20\x07\x08\x00"
    assert not accepts(tagged) and accepts(ethernet())
    assert guest.command(spec.CTRL_VLAN, spec.CTRL_VLAN_ADD, struct.pack("<H", 7)) and accepts(tagged)
    assert guest.command(spec.CTRL_VLAN, spec.CTRL_VLAN_DEL, struct.pack("<H", 7)) and not accepts(tagged)
    assert not guest.command(spec.CTRL_VLAN, spec.CTRL_VLAN_ADD, struct.pack("<H", 4096))
    guest = Guest(guest.device, BASE | spec.F_CTRL_VQ | spec.F_CTRL_RX)
    guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\0")
    assert guest.device.vdev.filter.accepts(tagged), "without CTRL_VLAN all tags pass"


@pytest.mark.parametrize(
    "command",
    [
        b"\0", b"\0\0", b"\0\0\2", b"\0\0\1\1", b"\0\6\1", b"\1\0", b"\1\0\0\0\0\0", b"\1\1\0\0\0\0\0",
        b"\1\1\1\0\0\0\0\0", b"\1\0\xff\xff\xff\xff\0\0\0\0", b"\1\0\0\0\0\0\0\0\0\0\0", b"\2\0\1",
        b"\1\0\0\0\0\0\1\0\0\0abc",
        b"\2\2\1\0", b"\3\1", b"\4\0\1\0", b"\5\0\0\0\0\0", b"\5\0" + b"\xff" * 8, b"\6\0", b"\xff\xff\xff",
    ],
)  # fmt: skip
def test_5_1_9_5_malformed_commands_fail_and_change_nothing(card: Card, command: bytes) -> None:
    guest = Guest(card(peer="./lan0"))
    before = guest.device.vdev.filter.report()
    request = guest.control.submit([command], [1])
    guest.device.settle()
    guest.control.reap()
    assert request.result() == spec.CTRL_ERR and request.length == 1
    assert guest.device.vdev.filter.report() == before
    assert guest.command(spec.CTRL_RX, spec.CTRL_RX_PROMISC, b"\1")


def test_5_1_9_5_commands_cut_anyhow_and_too_long(card: Card) -> None:
    guest = Guest(card(none=True))
    request = guest.control.submit([b"\0", b"\0", b"\0"], [1, 1])
    guest.device.settle()
    guest.control.reap()
    assert request.result()[:1] == spec.CTRL_OK and not guest.device.vdev.filter.promisc
    request = guest.control.submit([b"\1\0" + bytes(70_000)], [1])
    guest.device.settle()
    guest.control.reap()
    assert request.result() == spec.CTRL_ERR


def test_5_1_9_5_no_room_for_the_answer_needs_a_reset(card: Card) -> None:
    guest = Guest(card(none=True))
    guest.control.submit([b"\0\0\1"], [])
    guest.device.settle()
    assert guest.driver.needs_reset and not guest.device.ctx.faults


def test_5_1_9_5_9_guest_offloads(card: Card) -> None:
    guest = Guest(card(peer="./lan0"))
    for offloads, right in ((0, True), (spec.GUEST_OFFLOADS, True), (spec.F_GUEST_TSO4, False), (1, False)):
        data = struct.pack("<Q", offloads)
        assert guest.command(spec.CTRL_GUEST_OFFLOADS, spec.CTRL_GUEST_OFFLOADS_SET, data) is right


class _Card:
    def __init__(self) -> None:
        self.filter = RxFilter(MAC_A)

    def set_mac(self, mac: bytes) -> None:
        assert len(mac) == 6 and not mac[0] & 1

    def acknowledge_announce(self) -> None: ...

    def set_pairs(self, pairs: int) -> bool:
        return pairs == 1

    def set_guest_offloads(self, offloads: int) -> bool:
        assert not offloads & ~spec.GUEST_OFFLOADS
        return True


@given(st.binary(max_size=64), st.integers(0, 1 << 24))
@settings(deadline=None)
def test_any_command_is_answered(command: bytes, features: int) -> None:
    card = _Card()
    assert execute(command, features, card) in (True, False)
    assert card.filter.accepts(command) in (True, False)


@pytest.mark.parametrize(
    ("modes", "frame", "passes"),
    [
        ({}, ethernet(MAC_A), True),
        ({}, ethernet(MAC_B), False),
        ({"alluni": True}, ethernet(MAC_B), True),
        ({"alluni": True, "nouni": True}, ethernet(MAC_B), False),
        ({"nouni": True}, ethernet(MAC_A), False),
        ({}, ethernet(MULTI), False),
        ({"allmulti": True}, ethernet(MULTI), True),
        ({"allmulti": True, "nomulti": True}, ethernet(MULTI), False),
        ({}, ethernet(b"\xff" * 6), True),
        ({"nobcast": True, "allmulti": True}, ethernet(b"\xff" * 6), False),
        ({"promisc": True, "nouni": True, "nobcast": True}, ethernet(MAC_B), True),
    ],
)
def test_5_1_9_5_1_filter(modes: dict[str, bool], frame: bytes, passes: bool) -> None:
    card_filter = RxFilter(MAC_A)
    card_filter.promisc = False
    for name, value in modes.items():
        setattr(card_filter, name, value)
    assert card_filter.accepts(frame[:18]) is passes
