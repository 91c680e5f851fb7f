"""A vdev behind a session of this process, in the place of one on a bus, for the contracts of vdevs."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvm_vhost_user.server import VhostUserServer
from qvm_vhost_user.testing import Client
from qvm_vhost_user.testing_driver import VhostUserDriver

from qvmcore.api import (
    AddressSpace,
    ClientError,
    GuestEnd,
    GuestMemory,
    MmioHandler,
    PciFunction,
    VirtioVdev,
    Window,
)
from qvmcore.options import convert_options
from qvmcore.termination import StepResult
from qvmcore.testing.fakes import BASE, RAM, FakeContext, Plugged


class OneLife:
    """A Served: the one life of a vdev of a test."""

    def __init__(self, vdev: VirtioVdev, ctx: FakeContext) -> None:
        self.name = ctx.name
        self.vdev = vdev
        self.memory = ctx.memory
        self.log: logging.LoggerAdapter[logging.Logger] = ctx.log
        self.function: PciFunction | None = None
        self.config: MmioHandler | None = None
        self.used = False
        self.poll = 0.0
        self.fault = ctx.fault

    def reset(self) -> None:
        """As the core does."""
        self.vdev.on_reset()


class BehindVhostUser(Plugged[Any]):
    """A vdev served to one client. ``memory`` is the client's; there are no windows and no interrupts."""

    def __init__(self, cls: type[VirtioVdev], options: Mapping[str, object], base_dir: Path) -> None:
        converted, problems = convert_options(cls.Options, options, base_dir)
        assert not problems, problems
        made = cls.for_options(converted)
        ctx = FakeContext(f"{made.vdev_type}_test", GuestMemory(), made.irqs, base_dir)
        super().__init__(made(ctx, converted), ctx, AddressSpace(), BASE)
        self.memory = GuestMemory.allocate(RAM)
        self.errors: list[ClientError] = []
        self._driver: VhostUserDriver | None = None
        self._connection: socket.socket | None = None
        self._thread: threading.Thread | None = None
        ctx.threads_allowed = True
        self.vdev.on_configured()
        self.session = VhostUserServer().bind(OneLife(self.vdev, ctx))
        self.vdev.on_starting()

    @property
    def windows(self) -> Sequence[Window]:
        """None: registers are messages here."""
        return ()

    def driver(self) -> VhostUserDriver:
        """The driver of the one client there is."""
        assert self._driver is None, "one client a life"
        ours, self._connection = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="session", daemon=True)
        self._thread.start()
        self._driver = VhostUserDriver(Client(ours), self.memory, self.vdev.queue_sizes)
        return self._driver

    def terminate(self, end: GuestEnd | None = None) -> tuple[StepResult, ...]:
        """As the core: shut the client out, then run the plan of the life."""
        if self._connection is not None and self._thread is not None:
            try:
                self._connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # The client went first.
                pass
            self._thread.join(10)
            assert not self._thread.is_alive(), "the session does not end"
            self._connection.close()
        if self._driver is not None:
            self._driver.close()
            self._driver = None
        return super().terminate(end)

    def close(self) -> None:
        """Also unmap both views of the memory."""
        self.terminate()
        self.ctx.memory.close()
        self.memory.close()

    def _serve(self) -> None:
        assert self._connection is not None
        try:
            self.session.serve(self._connection)
        except ClientError as error:
            self.errors.append(error)
            # As the core closes it: the client sees the end.
            self._connection.shutdown(socket.SHUT_RDWR)


def open_descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
        except FileNotFoundError:
            pass  # that of the listing itself
    return sorted(found)
