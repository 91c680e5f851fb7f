"""``qvm serve --vfio-user``: vdevs as PCI devices of a VMM that speaks vfio-user.

Importing this package opens nothing.
"""

from collections.abc import Iterable

from qvm_vfio_user.server import VfioUser
from qvmcore.api import Server, hookimpl

__all__ = ["VfioUser", "qvm_servers"]


@hookimpl
def qvm_servers() -> Iterable[Server]:
    """The server this distribution offers."""
    return [VfioUser()]
