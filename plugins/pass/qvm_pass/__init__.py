"""vdev ``pass``: a physical PCI function of the host, by VFIO."""

from __future__ import annotations

from collections.abc import Iterable

from qvmcore.api import Vdev, hookimpl


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    """The vdev class; imported only when asked for."""
    from qvm_pass.device import Pass

    return [Pass]
