"""``qvm guest``: builds small Linux guests out of the packages of a Debian-like machine.

Light on purpose: `qvm` imports this file to list its commands, so everything else waits for a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qvmcore.api import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def qvm_cli_commands(register: Callable[[str, click.Command], None]) -> None:
    """Add ``qvm guest``."""
    from qvm_guests.cli import guest

    register("guest", guest)
