"""vdev ``pci-dummy``: a PCI function that is there and does nothing."""

from __future__ import annotations

from qvm_pci_dummy.device import PciDummy
from qvmcore.api import Vdev, hookimpl

__all__ = ["PciDummy", "qvm_vdev_types"]


@hookimpl
def qvm_vdev_types() -> list[type[Vdev]]:
    """The vdev types of this package."""
    return [PciDummy]
