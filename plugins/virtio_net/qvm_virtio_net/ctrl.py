"""Commands of the control queue (virtio 1.4, 5.1.9.5): parsed, checked, applied. No queue, no host."""

from __future__ import annotations

from typing import Protocol

from qvm_virtio_net import spec
from qvm_virtio_net.filter import TABLE_MAX, RxFilter

#: The longest command that is looked at, bytes: two tables of 5000 addresses. Longer ones fail.
COMMAND_BYTES_MAX = 64 * 1024

_SWITCHES = {
    spec.CTRL_RX_PROMISC: ("promisc", spec.F_CTRL_RX),
    spec.CTRL_RX_ALLMULTI: ("allmulti", spec.F_CTRL_RX),
    spec.CTRL_RX_ALLUNI: ("alluni", spec.F_CTRL_RX_EXTRA),
    spec.CTRL_RX_NOMULTI: ("nomulti", spec.F_CTRL_RX_EXTRA),
    spec.CTRL_RX_NOUNI: ("nouni", spec.F_CTRL_RX_EXTRA),
    spec.CTRL_RX_NOBCAST: ("nobcast", spec.F_CTRL_RX_EXTRA),
}


class Card(Protocol):
    """What commands act upon. Worker thread."""

    filter: RxFilter

    def set_mac(self, mac: bytes) -> None:
        """The address of filter and configuration."""

    def acknowledge_announce(self) -> None:
        """Clear the announce bit of the configuration."""

    def set_pairs(self, pairs: int) -> bool:
        """Use this many queue pairs; False when that cannot be."""

    def set_guest_offloads(self, offloads: int) -> bool:
        """What the driver wants to be given, a subset of GUEST_OFFLOADS; False when it cannot be."""


def execute(command: bytes, features: int, card: Card) -> bool:
    """Do a command (class, command, data) of a driver with these features; whether it was right.

    A command that is refused changed nothing.
    """
    if len(command) < 2:
        return False
    kind, which, data = command[0], command[1], command[2:]
    if kind == spec.CTRL_RX:
        return _switch(which, data, features, card.filter)
    if kind == spec.CTRL_MAC:
        return _mac(which, data, features, card)
    if kind == spec.CTRL_VLAN and features & spec.F_CTRL_VLAN:
        wanted = which == spec.CTRL_VLAN_ADD
        known = wanted or which == spec.CTRL_VLAN_DEL
        return known and len(data) == 2 and card.filter.set_vlan(int.from_bytes(data, "little"), wanted)
    if kind == spec.CTRL_ANNOUNCE and features & spec.F_GUEST_ANNOUNCE:
        if which != spec.CTRL_ANNOUNCE_ACK:
            return False
        card.acknowledge_announce()
        return True
    if kind == spec.CTRL_MQ and features & spec.F_MQ:
        known = which == spec.CTRL_MQ_VQ_PAIRS_SET and len(data) == 2
        return known and card.set_pairs(int.from_bytes(data, "little"))
    if kind == spec.CTRL_GUEST_OFFLOADS and features & spec.F_CTRL_GUEST_OFFLOADS:
        if which != spec.CTRL_GUEST_OFFLOADS_SET or len(data) != 8:
            return False
        offloads = int.from_bytes(data, "little")
        return not offloads & ~(features & spec.GUEST_OFFLOADS) and card.set_guest_offloads(offloads)
    return False


def _switch(which: int, data: bytes, features: int, rx_filter: RxFilter) -> bool:
    name, needed = _SWITCHES.get(which, ("", 0))
    if not features & needed or data not in (b"\0", b"\1"):
        return False
    setattr(rx_filter, name, data == b"\1")
    return True


def _mac(which: int, data: bytes, features: int, card: Card) -> bool:
    if which == spec.CTRL_MAC_ADDR_SET and features & spec.F_CTRL_MAC_ADDR:
        # A card with a multicast address would receive nothing that it could answer.
        if len(data) != 6 or data[0] & 1:
            return False
        card.set_mac(data)
        return True
    if which != spec.CTRL_MAC_TABLE_SET or not features & spec.F_CTRL_RX:
        return False
    tables = []
    for _ in range(2):
        count = int.from_bytes(data[:4], "little")
        if len(data) < 4 or count > (len(data) - 4) // 6:
            return False
        exact = count <= TABLE_MAX
        tables.append([data[4 + 6 * i : 10 + 6 * i] for i in range(count)] if exact else None)
        data = data[4 + 6 * count :]
    if data:
        return False
    card.filter.set_table(*tables)
    return True
