"""vdev ``virtio-blk``: a disk of the guest, backed by a file, a block device or memory."""

from __future__ import annotations

from collections.abc import Iterable

from qvmcore.api import Vdev, hookimpl


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    """The vdev class; imported only when asked for."""
    from qvm_virtio_blk.device import VirtioBlk

    return [VirtioBlk]
