"""The server of ``qvm serve --vfio-user``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from qvm_vfio_user import hints
from qvm_vfio_user.session import VfioUserSession
from qvmcore.api import Served, Session, Vdev


class VfioUser:
    """Serves any vdev as a PCI function to a VMM that speaks vfio-user."""

    name: ClassVar[str] = "vfio-user"
    pci: ClassVar[bool] = True

    def refusal(self, cls: type[Vdev]) -> str:
        """Every vdev can be served: the core has made it a PCI function."""
        return ""

    def bind(self, served: Served) -> Session:
        """The protocol's side of one life of a vdev."""
        return VfioUserSession(served)

    def attach_lines(self, vdev: Vdev, path: Path) -> Sequence[tuple[str, str]]:
        """What QEMU and Cloud Hypervisor need on their command lines."""
        return hints.attach_lines(path)
