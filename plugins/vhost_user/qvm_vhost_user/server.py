"""The Server of ``qvm serve --vhost-user``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from qvm_vhost_user import hints
from qvm_vhost_user.session import VhostUserSession
from qvmcore.api import Served, Session, Vdev, VirtioVdev


class VhostUserServer:
    """Serves virtio devices; the client's VMM puts them on a bus of its own."""

    name: ClassVar[str] = "vhost-user"
    pci: ClassVar[bool] = False

    def refusal(self, cls: type[Vdev]) -> str:
        """Only virtio devices: the protocol carries rings, no registers."""
        if issubclass(cls, VirtioVdev):
            return ""
        return "vhost-user carries virtio devices only; try --vfio-user"

    def bind(self, served: Served) -> Session:
        """See Server."""
        return VhostUserSession(served)

    def attach_lines(self, vdev: Vdev, path: Path) -> Sequence[tuple[str, str]]:
        """See Server."""
        assert isinstance(vdev, VirtioVdev)
        return hints.attach_lines(vdev.device_id, vdev.queue_sizes, vdev.ctx.name, path, vdev.config_space())
