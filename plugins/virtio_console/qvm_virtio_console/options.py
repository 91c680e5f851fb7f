"""Options of virtio-console: what a ``[[vdev]]`` table may say. Pure: opens nothing."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from qvm_chardev import parse_spec

#: Ports beside the first; each costs the guest two queues.
MAX_FURTHER_PORTS = 30

_FORMS = (
    "stdio, terminal, null, pty[:LINK], unix:PATH, PATH, '<PATH' input, "
    "'>PATH' output, '>>PATH' append, '>|COMMAND', '<-', '>-'"
)


class PortOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One further port: /dev/virtio-ports/NAME in Linux, or one more hvc console."""

    name: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}$", description="what the guest finds it by")
    ]
    hostdev: Annotated[str, Meta(description=_FORMS)]
    console: Annotated[bool, Meta(description="a text console, not a port for programs")] = False

    def __post_init__(self) -> None:
        try:
            parse_spec(self.hostdev)
        except ValueError as error:
            raise ValueError(f"port {self.name!r}: {error}") from None


class ConsoleOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the guest's console, and its further ports, end on the host."""

    hostdev: Annotated[str, Meta(description=_FORMS)] = "stdio"
    escape: Annotated[
        Literal["ctrl-a", "none"],
        Meta(description="escape key of a terminal: Ctrl-A x quits, Ctrl-A h helps; none: no such key"),
    ] = "ctrl-a"
    ports: Annotated[
        list[PortOptions], Meta(max_length=MAX_FURTHER_PORTS, description="further ports (MULTIPORT)")
    ] = []

    def __post_init__(self) -> None:
        taken = dict.fromkeys(parse_spec(self.hostdev).claims, "the console")
        names: set[str] = set()
        for port in self.ports:
            if port.name in names:
                raise ValueError(f"two ports are called {port.name!r}; every port needs a name of its own")
            names.add(port.name)
            for claim in parse_spec(port.hostdev).claims:
                if claim in taken:
                    raise ValueError(f"port {port.name!r} and {taken[claim]} both want {claim}")
                taken[claim] = f"port {port.name!r}"

    @property
    def claims(self) -> tuple[str, ...]:
        """What of the process only one vdev can have, over all ports."""
        hostdevs = (self.hostdev, *(port.hostdev for port in self.ports))
        return tuple(claim for hostdev in hostdevs for claim in parse_spec(hostdev).claims)
