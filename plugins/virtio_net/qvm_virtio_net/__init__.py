"""vdev ``virtio-net``: a network card of the guest, on another VM, a tap interface or passt."""

from __future__ import annotations

from collections.abc import Iterable

from qvmcore.api import Vdev, hookimpl


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    """The vdev class; imported only when asked for."""
    from qvm_virtio_net.device import VirtioNet

    return [VirtioNet]
