"""Options of virtio-net: what a ``[[vdev]]`` table may say. Pure: opens nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from qvm_virtio_net.mac import parse_mac, stable_mac
from qvmcore.api import Size

#: What may stand behind the network interface names of Linux (IFNAMSIZ less the final zero).
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_LINK_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
#: Linux's sun_path holds 107 characters and a zero; the lock file beside the socket has 5 more.
LINK_PATH_MAX = 100
PAIRS_MAX = 8


class NetOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The guest's network card, and what it is plugged into: exactly one of peer, tap, user, none."""

    peer: Annotated[
        str,
        Meta(description="a cable to another VM: a name, or the path of a socket; the same in both files"),
    ] = ""
    tap: Annotated[str, Meta(description="a tap interface of the host, e.g. 'tap0'")] = ""
    user: Annotated[bool, Meta(description="the host's own network without privilege, by passt")] = False
    none: Annotated[bool, Meta(description="nothing: the guest sees a card without a cable")] = False
    mac: Annotated[
        str,
        Meta(description="the card's address; default: made of the names of VM and vdev, always the same"),
    ] = ""
    mtu: Annotated[
        int, Meta(ge=68, le=65535, description="largest packet without Ethernet header, bytes")
    ] = 1500
    queues: Annotated[int, Meta(ge=1, le=PAIRS_MAX, description="queue pairs; more than 1 with tap only")] = 1
    passt_options: Annotated[
        tuple[str, ...], Meta(description="further words for passt, e.g. ['-t', '2222:22']")
    ] = ()
    pcap: Annotated[str, Meta(description="write every frame to this file, for wireshark")] = ""
    pcap_limit: Annotated[Size, Meta(ge=4096, description="bytes at which the capture ends")] = Size(1 << 30)

    def __post_init__(self) -> None:
        chosen = self.hostdevs
        if len(chosen) != 1:
            found = " and ".join(chosen) if chosen else "none of them"
            raise ValueError(
                f'expected exactly one of peer = "NAME", tap = "tap0", user = true, none = true; '
                f"found {found}"
            )
        if self.mac:
            parse_mac(self.mac)
        if self.tap and (not _INTERFACE.fullmatch(self.tap) or self.tap in (".", "..") or "%" in self.tap):
            raise ValueError(
                f"tap {self.tap!r} is no interface name: up to 15 characters without '/', ':', '%'"
            )
        if self.peer:
            self._check_peer()
        if self.queues > 1 and not self.tap:
            raise ValueError(f"queues = {self.queues} needs a tap interface; {chosen[0]} has one queue pair")
        if self.passt_options and not self.user:
            raise ValueError("passt_options needs user = true")
        if any("\0" in word for word in (self.peer, self.pcap, *self.passt_options)):
            raise ValueError("text with a zero byte")

    def _check_peer(self) -> None:
        if "/" not in self.peer and not _LINK_NAME.fullmatch(self.peer):
            raise ValueError(
                f"peer {self.peer!r}: a name has up to 64 letters, digits and '_.+-'; a path has a '/'"
            )
        try:
            Path(self.peer).expanduser()
        except RuntimeError as error:
            user = self.peer.partition("/")[0]
            raise ValueError(f"peer: there is no home directory for {user!r}") from error
        if self.peer.endswith("/"):
            raise ValueError(f"peer {self.peer!r} is a folder; name a socket in it, as {self.peer}link0")

    @property
    def hostdevs(self) -> tuple[str, ...]:
        """The names of the hostdev options that are set."""
        return tuple(name for name in ("peer", "tap", "user", "none") if getattr(self, name))


def address_of(options: NetOptions, machine: str, name: str) -> bytes:
    """The card's address: the configured one, or the generated one."""
    return parse_mac(options.mac) if options.mac else stable_mac(machine, name)
