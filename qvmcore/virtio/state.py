"""The state of a virtio device, shared by all transports.

:mod:`~qvmcore.virtio.life` is what a device does in its life, :mod:`~qvmcore.virtio.registers` how a driver
on a bus directs it, :mod:`~qvmcore.virtio.remote` how one behind a socket does.
"""

from __future__ import annotations

from qvmcore.virtio.registers import DriverRegisters
from qvmcore.virtio.remote import RemoteDriver


class VirtioState(DriverRegisters, RemoteDriver):
    """The life of one virtio device, and the services its author uses as ``self.virtio``."""
