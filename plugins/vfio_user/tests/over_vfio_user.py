"""A vdev plugged behind a vfio-user socket, for the contracts of :mod:`qvmcore.testing`.

Server and client share the test's process: the vdev is that of :func:`qvmcore.testing.fakes.plug`, the
session is the real one on a thread, and each access of the kit's drivers is a message to it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from qvm_vfio_user import VfioUser
from qvm_vfio_user.testing import Client
from remote_function import RemoteFunction

from qvmcore.bus import AddressSpace, all_ones
from qvmcore.errors import ClientError
from qvmcore.memory import GuestMemory
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.plain import plain_function_of
from qvmcore.pci.vdev import PciVdev
from qvmcore.termination import StepResult
from qvmcore.testing import fakes
from qvmcore.testing.conformance import Kit
from qvmcore.testing.fake_pci import FakePciBus
from qvmcore.testing.fakes import BASE, RAM, FakeIrq, Plugged, plug
from qvmcore.types import GuestEnd, MmioHandler
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev


class FakeServed:
    """One life of a plugged vdev, as the core hands it to a session."""

    def __init__(self, inner: Plugged[Any], bus: FakePciBus) -> None:
        self.name = inner.ctx.name
        self.vdev = inner.vdev
        self.memory: GuestMemory = inner.memory
        self.log: logging.LoggerAdapter[logging.Logger] = inner.ctx.log
        self.function: PciFunction | None = bus.function
        self.config: MmioHandler | None = MmioHandler(bus.config_read, bus.config_write)
        self.used = False
        self.poll = 0.0
        self.resets = 0
        self._fault = inner.ctx.fault

    def fault(self, error: BaseException) -> None:
        """Recorded in ``ctx.faults``."""
        self._fault(error)

    def reset(self) -> None:
        """The vdev, then its function."""
        self.resets += 1
        try:
            self.vdev.on_reset()
        except Exception as error:
            self.fault(error)
        assert self.function is not None
        self.function.reset()


class OverVfioUser(Plugged[Any]):
    """A plugged vdev that a client has attached, enumerated and given memory."""

    def __init__(self, inner: Plugged[Any], hung: FakePciBus, *, posted: bool = False) -> None:
        super().__init__(inner.vdev, inner.ctx, inner.bus, inner.base)
        self.transport, self.pci = inner.transport, hung
        self.served = FakeServed(inner, hung)
        #: What ended the connection, if the client broke the protocol.
        self.client_error: ClientError | None = None
        self.memory = GuestMemory.allocate(RAM)
        ours, theirs = socket.socketpair()
        self.client = Client(ours)
        self._connection = theirs
        self.remote: RemoteFunction | None = None
        hung.function.reset()
        self.session = VfioUser().bind(self.served)
        self._thread = threading.Thread(target=self._serve, name="vfio-user-session")
        self._thread.start()
        try:
            self.vdev.on_starting()
            self.client.version()
            irq = self.ctx.irqs[0] if self.ctx.irqs else FakeIrq()
            self.remote = RemoteFunction(self.client, irq, posted=posted, aperture=BASE)
            self.remote.share(self.memory.regions)
            self.device = self.remote.device
            self.device.enumerate()
        except BaseException:
            self.close()
            raise
        self.bus = self.remote  # type: ignore[assignment]
        self.base = self.device.bars.get(0, (BASE, 0))[0]

    def settle(self, timeout: float = 5.0) -> None:
        """Also wait until the session has taken every message sent before."""
        if self._thread.is_alive():
            self.client.info()
        super().settle(timeout)

    def terminate(self, end: GuestEnd | None = None) -> tuple[StepResult, ...]:
        """As ``qvm serve`` ends: the connection is shut down, then the plan runs."""
        if self._thread.is_alive():
            self._connection.shutdown(socket.SHUT_RDWR)
            self._thread.join(5)
            assert not self._thread.is_alive(), "the session does not return"
            self._connection.close()
        if self.remote is not None:
            self.remote.close()
        return super().terminate(end)

    def close(self) -> None:
        """Terminate, leave, unmap the memory of both sides."""
        self.terminate()
        self.client.close()
        self.served.memory.close()
        self.memory.close()

    def _serve(self) -> None:
        try:
            self.session.serve(self._connection)
        except ClientError as error:
            self.client_error = error


def plug_over_vfio_user(
    vdev_class: type[Vdev], options: Mapping[str, object], base_dir: Path, *, posted: bool = False
) -> OverVfioUser:
    """As :func:`~qvmcore.testing.fakes.plug`, with the guest on the other side of a socket."""
    inner = plug(vdev_class, options, ram=(), base_dir=base_dir, start=False, transport="pci")
    try:
        hung = inner.pci or _hang_plain(inner)
        return OverVfioUser(inner, hung, posted=posted)
    except BaseException:
        inner.close()
        raise


def _hang_plain(inner: Plugged[Any]) -> FakePciBus:
    """A vdev that knows nothing of PCI, as a function, as the core makes it for such a server."""
    assert not isinstance(inner.vdev, PciVdev | VirtioVdev)
    interrupts = PciInterrupts(inner.vdev.irqs, intx=inner.vdev.irqs > 0)
    ctx = inner.ctx
    ctx.pci_lines = [interrupts.line(index) for index in range(inner.vdev.irqs)]
    ctx.function = plain_function_of(inner.vdev, interrupts)
    irq = ctx.irqs[0] if ctx.irqs else FakeIrq()
    return FakePciBus(
        ctx.function, AddressSpace(), irq, ctx.name, lambda handler: fakes._isolated(handler, ctx)
    )


class VfioUserDriven(Kit):
    """A mixin before any class of the kit: its devices are behind a socket."""

    posted = False

    def plugged(self, tmp_path: Path) -> Plugged[Any]:
        """One more device."""
        return plug_over_vfio_user(self.vdev_class, self.make_options(tmp_path), tmp_path, posted=self.posted)

    @pytest.fixture(autouse=True)
    def transport(self) -> str:
        """Always PCI, and only once."""
        return "pci"

    @pytest.fixture
    def on_pci(self, tmp_path: Path) -> Iterator[Plugged[Any]]:
        """For :class:`~qvmcore.testing.pci.PciConformance`."""
        with self.plugged(tmp_path) as device:
            yield device
            assert device.ctx.faults == []

    def test_undeclared_sizes_never_reach_the_vdev(self, device: Plugged[Any]) -> None:
        """Smaller ones read all ones; larger ones become several of the largest that is declared."""
        base = 0
        for window in device.windows:
            largest = max(window.access)
            for size in {1, 2, 4, 8} - window.access:
                if size < min(window.access):
                    assert device.read(base, size) == all_ones(size)
                elif size > largest:
                    pieces = [device.read(base + at, largest) for at in range(0, size, largest)]
                    value = sum(piece << 8 * largest * at for at, piece in enumerate(pieces))
                    assert device.read(base, size) == value
            base += window.size

    def test_the_accesses_were_messages(self, device: Plugged[Any]) -> None:
        """Without which the rest would say nothing about the server."""
        assert isinstance(device, OverVfioUser) and device.device is not None
        before = next(device.client._ids)
        device.device.read(0, 2)
        assert next(device.client._ids) == before + 2
