"""The hooks of the plugin: vdev ``quiesce``, the steps of the end, ``qvm quiesce``.

Apart from ``qvm_quiesce/__init__``, which a guard process imports and which must stay light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from qvmcore.api import TerminationCallback, Vdev, hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    """The vdev class."""
    from qvm_quiesce.vdev import QuiesceVdev

    return [QuiesceVdev]


@hookimpl
def qvm_termination_callbacks(machine: Any) -> Iterable[TerminationCallback]:
    """Attach the physical devices of the machine, start the guard, and say what the end has to do."""
    from qvm_quiesce.session import callbacks

    return callbacks(machine)


@hookimpl
def qvm_cli_commands(register: Callable[[str, click.Command], None]) -> None:
    """Add ``qvm quiesce``."""
    from qvm_quiesce.cli import quiesce

    register("quiesce", quiesce)
