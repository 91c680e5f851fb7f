"""The contracts of vdevs, kept while a real vCPU of an engine makes every register access.

A mixin before any class of :mod:`qvmcore.testing.conformance` or :mod:`qvmcore.testing.pci`::

    class TestBlkOnMine(EngineDriven, TestVirtioBlk):
        engine = MyEngine()
        arch = Aarch64()          # from qvmcore.testing.guest_archs

The vdev, its worker and its fakes are those of :func:`qvmcore.testing.fakes.plug`. Its windows,
configuration space included, are on the bus of a guest that runs the program of
:mod:`qvmcore.testing.access_server`; the drivers of the kit stay in the test, but each of their
loads and stores is an instruction of that guest, its exit, and the engine's way to the bus and back.
Where the engine has ``fast_doorbells``, notifications are eventfds of the kernel. Interrupts still
end in the fake lines, which count; those of the engine are :class:`EngineConformance`'s business.

An access that is not aligned, or wider than ``widest``, is a matter of the CPU (it may be cut in two,
or into aligned ones): that a vdev survives it whole is shown without an engine, so such accesses go
to the bus directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvmcore.engine import Engine
from qvmcore.pci import spec as pci
from qvmcore.testing.access_server import AccessServer, EngineBus
from qvmcore.testing.conformance import Kit
from qvmcore.testing.fakes import Plugged, default_transport
from qvmcore.testing.guest_archs import GuestArch
from qvmcore.testing.pci import EcamConfig
from qvmcore.testing.pci_driver import PciDevice
from qvmcore.types import MmioHandler, PciAddress, Window

#: Where the configuration space of a function on PCI is, guest-physical.
CONFIG = 0x0B00_0000


class AlignedBus(EngineBus):
    """Makes aligned accesses up to ``widest`` bytes by the guest, all others directly."""

    def __init__(self, server: AccessServer, widest: int) -> None:
        super().__init__(server)
        self._widest = widest
        #: How many accesses the guest has made.
        self.driven = 0

    def read(self, address: int, size: int) -> int:
        """A load of ``size`` bytes."""
        if address % size or size > self._widest:
            return self.server.bus.read(address, size)
        self.driven += 1
        return super().read(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        """A store of ``size`` bytes."""
        if address % size or size > self._widest:
            self.server.bus.write(address, size, value)
        else:
            self.driven += 1
            super().write(address, size, value)


class DrivenPlugged(Plugged[Any]):
    """A plugged vdev whose registers a guest of ``engine`` accesses; close stops the guest first."""

    def __init__(self, inner: Plugged[Any], engine: Engine, arch: GuestArch, widest: int = 8) -> None:
        self.server = AccessServer(engine, arch, bus=inner.bus, regions=inner.memory.regions)
        self.driven = AlignedBus(self.server, widest)
        super().__init__(inner.vdev, inner.ctx, self.driven, inner.base)  # type: ignore[arg-type]
        self.transport, self.pci, self.device = inner.transport, inner.pci, inner.device
        try:
            self.server.start()
            if inner.pci is not None and inner.device is not None:
                space = MmioHandler(inner.pci.config_read, inner.pci.config_write)
                self.server.bus.place(CONFIG, Window(pci.EXTENDED_SIZE), space, "access-server, ECAM")
                config = EcamConfig(self.driven, CONFIG, PciAddress(0))
                self.device = PciDevice(config, inner.base)
                self.device.enumerate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the guest, end the vdev as the framework does, unmap the memory."""
        try:
            self.server.close()
        finally:
            super().close()


class EngineDriven(Kit):
    """See the module."""

    engine: Engine
    arch: GuestArch
    widest = 8

    @pytest.fixture(autouse=True)
    def _usable(self) -> None:
        self.skip_unless_usable()

    def skip_unless_usable(self) -> None:
        """Skip with the engine's reason."""
        reason = self.engine.unusable(self.arch.name)
        if reason:
            pytest.skip(f"engine {self.engine.name}: {reason}")

    def plugged(self, tmp_path: Path) -> Plugged[Any]:
        """One more device, in front of a guest of its own."""
        inner = super().plugged(tmp_path)
        try:
            return DrivenPlugged(inner, self.engine, self.arch, self.widest)
        except BaseException:
            inner.close()
            raise

    @pytest.fixture
    def on_pci(self, tmp_path: Path) -> Iterator[Plugged[Any]]:
        """For :class:`~qvmcore.testing.pci.PciConformance`."""
        with default_transport("pci"), self.plugged(tmp_path) as device:
            yield device
            assert device.ctx.faults == []

    def test_the_guest_made_the_accesses(self, device: Plugged[Any]) -> None:
        """Without which the rest would say nothing about the engine."""
        assert isinstance(device, DrivenPlugged)
        before = device.driven.driven
        width = min(4, max(device.windows[0].access)) if device.windows else 4
        device.read(0, width)
        assert device.driven.driven == before + 1
