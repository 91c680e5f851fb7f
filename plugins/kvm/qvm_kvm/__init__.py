"""The ``kvm`` engine of qvm: guests of the host's own architecture at hardware speed, by /dev/kvm.

Importing this package opens nothing.
"""

from collections.abc import Iterable

from qvmcore.api import Engine, hookimpl


@hookimpl
def qvm_engines() -> Iterable[Engine]:
    """The engine this distribution offers."""
    from qvm_kvm.engine import KvmEngine

    return [KvmEngine()]
