"""A vdev and its session in this process, with clients at the other ends of socket pairs."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import pytest
from qvm_vhost_user.protocol import ProtocolFeature
from qvm_vhost_user.session import VhostUserSession
from qvm_vhost_user.testing import ALL_FEATURES, Client, Closed
from qvm_vhost_user.testing_driver import VhostUserDriver
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IN, OK, header

from qvmcore.api import (
    ClientError,
    GuestEnd,
    GuestMemory,
    MemorySpec,
    Phase,
    Reason,
    TerminationCallback,
    VirtioVdev,
)
from qvmcore.options import convert_options
from qvmcore.testing.fakes import FakeContext

#: Seconds until something that has to happen is given up.
LIMIT = 10.0
SECTORS = 2048
RAM = (MemorySpec(0x8000_0000, 4 << 20),)
#: With it, the memory says where a ring begins, whatever SET_VRING_BASE does.
WITHOUT_INFLIGHT = ALL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD.mask
#: What is used when a client knows less and less of the protocol.
PROTOCOLS = {
    "all": ALL_FEATURES,
    "UML's": sum(1 << bit for bit in (3, 5, 9)),
    "none": 0,
}

V = TypeVar("V", bound=VirtioVdev)


class ServedVdev(Generic[V]):
    """A Served with a vdev made from options, and its session. A context manager that ends its life."""

    function = None
    config = None

    def __init__(self, cls: type[V], **options: object) -> None:
        converted, problems = convert_options(cls.Options, options, Path())
        assert not problems, problems
        self.memory = GuestMemory()
        self.ctx = FakeContext(f"{cls.vdev_type}_test", self.memory, cls.irqs)
        self.log = self.ctx.log
        self.name = self.ctx.name
        self.used = False
        self.poll = 0.0
        self.vdev = cls(self.ctx, converted)
        self.ctx.threads_allowed = True
        self.vdev.on_configured()
        self.session = VhostUserSession(self)
        self.vdev.on_starting()

    def fault(self, error: BaseException) -> None:
        """See Served."""
        self.ctx.fault(error)

    def reset(self) -> None:
        """See Served."""
        self.vdev.on_reset()

    def connect(self) -> Connection:
        """A client, served on a thread of its own."""
        return Connection(self.session)

    @contextlib.contextmanager
    def driver(
        self, protocol: int = ALL_FEATURES, *, packed: bool = False, wanted: int | None = None
    ) -> Iterator[VhostUserDriver]:
        """A driver that has started the device."""
        memory = GuestMemory.allocate(RAM)
        connection = self.connect()
        driver = VhostUserDriver(connection.client, memory, self.vdev.queue_sizes, protocol=protocol)
        try:
            driver.packed = packed
            driver.start(wanted)
            yield driver
        finally:
            driver.close()
            error = connection.finish()
            memory.close()
        if error is not None:
            raise error

    def close(self) -> None:
        """The termination plan, as the core runs it, then the client's memory is unmapped."""
        plan = self.ctx.plan
        plan.add(TerminationCallback("worker", Phase.STOP_WORKERS, self._stop_worker, 3.0))
        plan.add(TerminationCallback("vdev", Phase.RELEASE, self.vdev.on_terminate, 3.0))
        plan.run(GuestEnd(Reason.GUEST_SHUTDOWN, "test"))
        self.memory.close()

    def _stop_worker(self, _end: GuestEnd) -> None:
        assert self.ctx.stop_worker(), "the worker did not stop"

    def __enter__(self) -> ServedVdev[V]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Connection:
    """A client, and the session that serves it."""

    def __init__(self, session: Any) -> None:
        self.server, ours = socket.socketpair()
        self.client = Client(ours)
        self.error: BaseException | None = None
        self._session = session
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._session.serve(self.server)
        except BaseException as error:
            self.error = error
        finally:
            self.server.close()

    def finish(self) -> BaseException | None:
        """The client leaves; what the session raised."""
        self.client.close()
        return self.ended()

    def ended(self) -> BaseException | None:
        """Wait until the session has returned; what it raised."""
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the session did not return"
        return self.error

    def __enter__(self) -> Client:
        return self.client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


def make_disk(folder: Path) -> ServedVdev[VirtioBlk]:
    """A disk of 2048 sectors, each of which is told by :func:`content`."""
    (folder / "disk.img").write_bytes(b"".join(map(content, range(SECTORS))))
    return ServedVdev(VirtioBlk, hostdev=str(folder / "disk.img"))


def finish(driver: VhostUserDriver, index: int = 0) -> None:
    """Wait until nothing is in flight in a queue."""
    ring = driver.queues[index]
    ring.reap()
    while ring.in_flight:
        assert driver.wait(index, LIMIT), f"{ring.in_flight} requests are never answered"
        ring.reap()


def stands_still(served: ServedVdev[Any], driver: VhostUserDriver, index: int = 0) -> None:
    """What was offered and notified is not looked at."""
    served.ctx.settle(LIMIT)
    assert driver.queues[index].in_flight
    assert driver.queues[index].reap() == []


def read(driver: VhostUserDriver, sector: int) -> bytes:
    """A sector of the disk."""
    request = driver.queues[0].submit([header(IN, sector)], [512, 1])
    finish(driver)
    data = request.result()
    assert data[-1] == OK
    return data[:-1]


def content(sector: int) -> bytes:
    """What the image has there."""
    return sector.to_bytes(4, "little") * 128


def rejected(served: ServedVdev[Any], talk: Callable[[Client], object], message: str) -> None:
    """The client is shut out with this message for what it says, and nothing of it stays."""
    before = descriptors()
    connection = served.connect()
    with pytest.raises(Closed):
        talk(connection.client)
        connection.client.receive()
    error = connection.finish()
    assert isinstance(error, ClientError) and message in str(error), error
    assert not descriptors() - before
    assert served.ctx.faults == []


def descriptors() -> Counter[str]:
    """What this process has open, by kind."""
    gc.collect()
    kinds: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kinds[str(Path(f"/proc/self/fd/{name}").readlink()).rstrip("0123456789]")] += 1
    return kinds
