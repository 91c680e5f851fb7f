"""The ``emulated`` engine of qvm: an aarch64 CPU in this process, by Unicorn.

Importing this package does not import Unicorn; creating a guest does.
"""

from collections.abc import Iterable

from qvmcore.api import Engine, hookimpl


@hookimpl
def qvm_engines() -> Iterable[Engine]:
    """The engine this distribution offers."""
    from qvm_emulator.engine import EmulatedEngine

    return [EmulatedEngine()]
