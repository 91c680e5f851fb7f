"""Options of virtio-console: what a ``[[vdev]]`` table may say. Pure: opens nothing."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from qvm_chardev import parse_spec


class ConsoleOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the guest's console ends on the host."""

    hostdev: Annotated[
        str,
        Meta(
            description="stdio, terminal, null, pty[:LINK], unix:PATH, PATH, '<PATH' input, "
            "'>PATH' output, '>>PATH' append, '>|COMMAND', '<-', '>-'"
        ),
    ] = "stdio"
    escape: Annotated[
        Literal["ctrl-a", "none"],
        Meta(description="escape key of a terminal: Ctrl-A x quits, Ctrl-A h helps; none: no such key"),
    ] = "ctrl-a"

    def __post_init__(self) -> None:
        parse_spec(self.hostdev)
