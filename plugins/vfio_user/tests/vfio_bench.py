"""A PCI device behind the real session, in this process: no core, no VMM.

Used as ``with serving(Probe) as bench:``; ``bench.client`` speaks first.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qvm_vfio_user import VfioUser
from qvm_vfio_user.testing import CONFIG_REGION, Client

from qvmcore.api import (
    BarWindow,
    ClientError,
    GuestMemory,
    MmioHandler,
    PciFunction,
    PciId,
    PciVdev,
    Vdev,
    Window,
)
from qvmcore.testing.fakes import Plugged, plug

MEMORY_AND_MASTER, MASTER_OFF = 0x6, 0x2
COMMAND = 4
MIB = 1 << 20


class Probe(PciVdev):
    """Records accesses; BAR 0 takes words, BAR 1 anything; a write to BAR 0 + 0x10 reads guest memory."""

    vdev_type = "probe"
    summary = "records"
    pci_id = PciId(0x1C05, 0x0043)
    pci_class = 0xFF0000
    windows = (Window(0x1000, access=frozenset({4})), BarWindow(0x1000, wide=True))
    irqs = 2
    resets = 0

    def on_configured(self) -> None:
        self.seen: list[tuple[str, int, int, int, int]] = []
        self.bytes = bytearray(0x1000)
        self.fetched: bytes | Exception = b""

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        value = int.from_bytes(self.bytes[offset : offset + size], "little")
        self.seen.append(("read", window, offset, size, value))
        return value

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", window, offset, size, value))
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")
        if (window, offset) == (0, 0x10):
            try:
                self.fetched = self.ctx.memory.read(value, 4)
            except Exception as error:
                self.fetched = error

    def on_reset(self) -> None:
        self.resets += 1
        self.bytes[:] = bytes(0x1000)


class FakeServed:
    """One life of a plugged vdev, as the core hands it to a session."""

    def __init__(self, inner: Plugged[Any]) -> None:
        assert inner.pci is not None
        self.name = inner.ctx.name
        self.vdev: Vdev = inner.vdev
        self.memory: GuestMemory = inner.ctx.memory
        self.log: logging.LoggerAdapter[logging.Logger] = inner.ctx.log
        self.function: PciFunction | None = inner.pci.function
        self.config: MmioHandler | None = MmioHandler(inner.pci.config_read, inner.pci.config_write)
        self.used = False
        self.poll = 0.0
        self.faults = inner.ctx.faults
        self.fault = inner.ctx.fault

    def reset(self) -> None:
        """As the core's."""
        self.vdev.on_reset()
        assert self.function is not None
        self.function.reset()


class Bench:
    """A session and its client; :attr:`error` is what ended it."""

    def __init__(self, inner: Plugged[Any]) -> None:
        assert inner.pci is not None
        inner.pci.function.reset()
        self.inner = inner
        self.vdev = inner.vdev
        self.served = FakeServed(inner)
        self.session = VfioUser().bind(self.served)
        self.error: BaseException | None = None
        self.connect()

    def connect(self) -> Client:
        """One more client, when the last one has gone."""
        ours, self.connection = socket.socketpair()
        self.client = Client(ours)
        self._thread = threading.Thread(target=self._serve, args=(self.connection,), name="session")
        self._thread.start()
        return self.client

    def ready(self) -> Client:
        """A client that agreed on a version and shares a MiB at 0, for a device that may use it."""
        self.client.version()
        self.share(0, MIB)
        self.client.write(CONFIG_REGION, COMMAND, 2, MEMORY_AND_MASTER)
        return self.client

    def share(self, address: int, size: int, fill: bytes = b"", offset: int = 0) -> None:
        """DMA_MAP of fresh memory that begins with ``fill``."""
        fd = os.memfd_create("client", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, offset + size)
            os.pwrite(fd, fill, offset)
            self.client.dma_map(address, size, fd, offset)
        finally:
            os.close(fd)

    def fetch(self, address: int) -> bytes | Exception:
        """What the device reads of guest memory."""
        self.client.write(0, 0x10, 4, address)
        fetched: bytes | Exception = self.vdev.fetched
        return fetched

    def ended(self) -> BaseException | None:
        """Wait until the session has returned; what it raised."""
        self._thread.join(5)
        assert not self._thread.is_alive(), "the session does not return"
        self.connection.close()
        return self.error

    def broken(self) -> str:
        """The message of the ClientError that must have ended the session."""
        error = self.ended()
        assert isinstance(error, ClientError), error
        return str(error)

    def close(self) -> None:
        """Leave, end the vdev, unmap."""
        self.client.close()
        self.ended()
        self.inner.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self.session.serve(connection)
        except BaseException as error:
            self.error = error
        finally:
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(cls: type[Vdev] = Probe, **options: object) -> Iterator[Bench]:
    """A device whose first client has connected and said nothing yet."""
    bench = Bench(plug(cls, options, ram=(), transport="pci"))
    try:
        yield bench
        assert bench.served.faults == []
    finally:
        bench.close()


class Event:
    """An eventfd of the client's."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def count(self, wait: float = 0) -> int:
        """How often it was signalled since; ``wait`` seconds for the first."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(wait * 1000):
            return 0
        return os.eventfd_read(self.fd)

    def __enter__(self) -> Event:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def open_fds() -> list[str]:
    """What this process has open, to see that nothing was left behind."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
        except FileNotFoundError:
            pass  # the listing itself
    return sorted(found)
