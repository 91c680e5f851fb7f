"""The guest's side of the factory, for tests."""

from __future__ import annotations

from qvm_shmem import spec
from qvm_shmem.device import Shmem
from qvm_shmem.spec import Status

from qvmcore.testing.fakes import Plugged


class Guest:
    """Asks for regions as README says."""

    def __init__(self, device: Plugged[Shmem]) -> None:
        self.device = device

    def load(self, address: int, size: int = 4) -> int:
        return self.device.bus.read(address, size)

    def store(self, address: int, value: int, size: int = 4) -> None:
        self.device.bus.write(address, size, value)

    @property
    def status(self) -> Status:
        return Status(self.device.read(0x14))

    def name(self, name: bytes) -> None:
        for offset, byte in enumerate(name[: spec.MAX_NAME].ljust(spec.MAX_NAME, b"\0")):
            self.device.write(spec.FACTORY_NAME + offset, byte, 1)

    def attach(self, name: bytes, pages: int = 1) -> int:
        """The address of the control page; 0 when refused."""
        self.name(name)
        self.device.write(spec.FACTORY_SIZE, pages)
        return self.device.read(0x08, 8)

    def find(self, name: bytes) -> int:
        self.name(name)
        self.device.write(spec.FACTORY_FIND, 0)
        return self.device.read(0x08, 8)
