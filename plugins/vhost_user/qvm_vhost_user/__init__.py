"""``qvm serve --vhost-user``: virtio devices of qvm for guests of other VMMs.

Importing this package opens nothing.
"""

from collections.abc import Iterable

from qvmcore.api import Server, hookimpl


@hookimpl
def qvm_servers() -> Iterable[Server]:
    """The server this distribution offers."""
    from qvm_vhost_user.server import VhostUserServer

    return [VhostUserServer()]
