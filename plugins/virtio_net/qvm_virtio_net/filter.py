"""Which frames a card receives: the filter the driver sets by the control queue (virtio 1.4, 5.1.9.5)."""

from __future__ import annotations

from collections.abc import Iterable

from qvm_virtio_net.mac import BROADCAST

#: Addresses of each kind that are filtered exactly; with more, all of that kind pass (5.1.9.5.2).
TABLE_MAX = 128
_VLAN = b"\x81\x00"
_VLANS = range(4096)


class RxFilter:
    """The receive filter. Worker thread; the modes are plain attributes that the control queue sets.

    Fresh, it lets everything pass (promiscuous), which is what a driver without CTRL_RX expects.
    """

    __slots__ = (
        "_multicast", "_unicast", "_vlans", "allmulti", "alluni", "mac", "nobcast", "nomulti", "nouni",
        "promisc",
    )  # fmt: skip

    def __init__(self, mac: bytes) -> None:
        self.mac = mac
        self.promisc = True
        self.allmulti = self.alluni = self.nomulti = self.nouni = self.nobcast = False
        self._unicast: frozenset[bytes] | None = frozenset()
        self._multicast: frozenset[bytes] | None = frozenset()
        #: None: the driver filters no VLANs.
        self._vlans: set[int] | None = None

    def filter_vlans(self) -> None:
        """The driver negotiated CTRL_VLAN: tagged frames need their VLAN in the table, empty now."""
        self._vlans = set()

    def set_table(self, unicast: Iterable[bytes] | None, multicast: Iterable[bytes] | None) -> None:
        """MAC_TABLE_SET; None for a table that is too long to be looked through: all pass."""
        self._unicast = None if unicast is None else frozenset(unicast)
        self._multicast = None if multicast is None else frozenset(multicast)

    def set_vlan(self, vlan: int, wanted: bool) -> bool:
        """Add or remove a VLAN; False when there is no such VLAN or no table."""
        if vlan not in _VLANS or self._vlans is None:
            return False
        if wanted:
            self._vlans.add(vlan)
        else:
            self._vlans.discard(vlan)
        return True

    def accepts(self, head: bytes | bytearray | memoryview) -> bool:
        """Whether a frame that begins with these bytes (18 of them, or all) is for this card."""
        if self.promisc:
            return True
        start = bytes(head)
        vlans = self._vlans
        if (
            vlans is not None
            and start[12:14] == _VLAN
            and int.from_bytes(start[14:16], "big") & 0xFFF not in vlans
        ):
            return False
        destination = start[:6]
        if destination == self.mac:
            return not self.nouni
        if destination == BROADCAST:
            return not self.nobcast
        if destination[0] & 1:
            table = self._multicast
            return not self.nomulti and (self.allmulti or table is None or destination in table)
        table = self._unicast
        return not self.nouni and (self.alluni or table is None or destination in table)

    def report(self) -> dict[str, object]:
        """The modes that are on, and the sizes of the tables; JSON-able."""
        names = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")
        return {
            "modes": [name for name in names if getattr(self, name)],
            "unicast": "all" if self._unicast is None else len(self._unicast),
            "multicast": "all" if self._multicast is None else len(self._multicast),
            "vlans": "all" if self._vlans is None else len(self._vlans),
        }
