"""vdev ``virtio-console``: a serial console of the guest on a terminal, file, pty or socket."""

from __future__ import annotations

from collections.abc import Iterable

from qvmcore.api import Vdev, hookimpl


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    """The vdev class; imported only when asked for."""
    from qvm_virtio_console.device import VirtioConsole

    return [VirtioConsole]
