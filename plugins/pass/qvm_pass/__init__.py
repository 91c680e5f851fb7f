"""vdevs ``pass``, a physical PCI function of the host by VFIO, and ``pass-uio``, a platform device by UIO."""

from __future__ import annotations

from collections.abc import Iterable

from qvmcore.api import MmioHandler, Vdev, Window, hookimpl


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    """The vdev classes; imported only when asked for."""
    from qvm_pass.device import Pass
    from qvm_pass.uio import PassUio

    return [Pass, PassUio]


@hookimpl
def qvm_bind_mmio(vdev: Vdev, index: int, window: Window) -> MmioHandler | None:
    """Registers of a platform device, which an engine may map into the guest."""
    # Named, not imported: other machines need none of what passing a device needs.
    if vdev.vdev_type != "pass-uio" or index:
        return None
    from qvm_pass.uio import PassUio

    return vdev.handler() if isinstance(vdev, PassUio) else None
