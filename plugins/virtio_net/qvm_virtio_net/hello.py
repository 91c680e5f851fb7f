"""The first message each end of a peer link sends: who it is. Pure.

Both ends check the other's hello in the same way, so both can tell their user what is wrong.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

#: Of the protocol after the hello; ends with different versions do not talk.
VERSION = 1
#: The longest hello, bytes.
HELLO_BYTES_MAX = 2048

_Text = Annotated[str, Meta(max_length=128)]


class Hello(msgspec.Struct, frozen=True):
    """One end of a link. Unknown fields of newer versions are ignored."""

    qvm_link: int
    link: _Text = ""
    vm: _Text = ""
    vdev: _Text = ""
    mac: _Text = ""
    mtu: int = 0
    #: Why this end refuses the other, if it does.
    refused: _Text = ""

    @property
    def who(self) -> str:
        """The end's name for a message; what came from elsewhere is quoted."""
        return f"vdev {self.vdev!r} of VM {self.vm!r}"


def encode(hello: Hello) -> bytes:
    """The message; names are cut to what the other end accepts."""
    short = {name: getattr(hello, name)[:128] for name in ("link", "vm", "vdev", "mac", "refused")}
    return msgspec.json.encode(msgspec.structs.replace(hello, **short))


def decode(data: bytes) -> Hello:
    """The other end's hello. ValueError when it is none."""
    try:
        return msgspec.json.decode(data, type=Hello)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it speaks another protocol ({error})") from error


def refusal(own: Hello, other: Hello) -> str:
    """Why these two ends do not belong together; empty when they do."""
    if other.qvm_link != own.qvm_link:
        return (
            f"link protocol {other.qvm_link}, this end has {own.qvm_link}: use one version of qvm-virtio-net"
        )
    if other.refused:
        return f"refused by the other end: {other.refused!r}"
    if other.link != own.link:
        return f"{other.who} calls the link {other.link!r}, this end {own.link!r}: the options peer differ"
    return ""


def warnings(own: Hello, other: Hello) -> list[str]:
    """What two ends that do talk had better change."""
    found = []
    if other.mac == own.mac:
        found.append(f"both ends have the address {own.mac}; set mac in one of the VM files")
    if other.mtu != own.mtu:
        found.append(f"mtu is {own.mtu} here and {other.mtu} there; larger packets will be lost")
    return found
