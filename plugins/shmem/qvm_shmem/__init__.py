"""vdev ``shmem``: named memory that several VMs share, with notifications (QNX's factory)."""

from __future__ import annotations

from collections.abc import Iterable

from qvmcore.api import Vdev, hookimpl


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    """The vdev class; imported only when asked for."""
    from qvm_shmem.device import Shmem

    return [Shmem]
