"""A real ``qvm serve`` to be attacked, and what has to hold of it after every attack."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from qvm_vhost_user.protocol import NEED_REPLY, U64, VERSION, Request
from qvm_vhost_user.testing import Client, Closed, Refused, Region
from qvm_vhost_user.testing_driver import USER, VhostUserDriver
from qvm_virtio_blk.testing import IN, OK, header

from qvmcore.memory import GuestMemory
from qvmcore.testing.fakes import RAM
from tests.foreign.qemu_serve import Serve

SECTORS = 128
QUEUES, QUEUE_SIZE = 2, 128
VM = """
[[vdev]]
type = "virtio-blk"
name = "disk"
hostdev = "disk.img"
queues = 2

[[vdev]]
type = "virtio-entropy"
name = "rng"
"""
#: Seconds until what a client left behind has to be gone.
LIMIT = 20.0


class Target:
    """A server of a disk, which is attacked, and of a random generator that has a good client throughout."""

    def __init__(self, folder: Path) -> None:
        (folder / "disk.img").write_bytes(b"".join(bytes([n]) * 512 for n in range(SECTORS)))
        self.serve = Serve(folder, VM, "vhost-user")
        self.memory = GuestMemory.allocate(RAM)
        self._witness_memory = GuestMemory.allocate(RAM)
        try:
            self._begin()
        except BaseException:
            self.serve.close()
            raise

    def _begin(self) -> None:
        self.witness = VhostUserDriver(Client.connect(self.path("rng")), self._witness_memory, [64])
        self.witness.start()
        self.works()
        self.baseline = self.resources()
        # The life after a good client is as every later one; wait until it is complete.
        self._until(self._steady, "a steady state")
        self.baseline = self.resources()

    def _steady(self) -> bool:
        before = self.resources()
        time.sleep(0.2)
        return self.resources() == before

    def path(self, name: str = "disk") -> Path:
        """The socket of a device."""
        return self.serve.socket(name)

    def client(self, timeout: float = 10.0) -> Client:
        """A client of the disk."""
        return Client.connect(self.path(), timeout)

    def driver(self, client: Client | None = None) -> VhostUserDriver:
        """A good driver of the disk that has not begun; the memory is used from the start."""
        return VhostUserDriver(client or self.client(), self.memory, [QUEUE_SIZE] * QUEUES)

    def region(self) -> Region:
        """All of the memory."""
        whole = self.memory.regions[0]
        return Region(whole.start, whole.size, whole.start + USER, whole.fd)

    # ---- what has to hold ----------------------------------------------------------------------

    def works(self) -> None:
        """A good client of the disk is served well."""
        with self.driver() as driver:
            driver.start()
            check_reads(driver)

    def witnessed(self) -> None:
        """The good client of the other device never noticed a thing."""
        mark = self.witness.ram.mark()
        request = self.witness.queues[0].submit([], [32])
        while not request.done:
            assert self.witness.wait(0), "the other device does not answer"
            self.witness.queues[0].reap()
        assert request.length == 32
        self.witness.ram.release(mark)

    def resources(self) -> tuple[Counter[str], int]:
        """Descriptors by kind, and the number of threads."""
        process = self.serve.process.pid
        kinds: Counter[str] = Counter()
        for name in os.listdir(f"/proc/{process}/fd"):
            try:
                kinds[re.sub(r"\d+", "N", os.readlink(f"/proc/{process}/fd/{name}"))] += 1  # noqa: PTH115
            except FileNotFoundError:
                pass  # closed meanwhile
        return kinds, len(os.listdir(f"/proc/{process}/task"))

    def clean(self) -> None:
        """Wait until nothing is left of the clients that have gone."""
        self._until(
            lambda: self.resources() == self.baseline,
            lambda: f"as before: {self.baseline}, but now there are {self.resources()}",
        )

    def survived(self, mark: int) -> None:
        """The process lives, said nothing of a bug since ``mark``, and serves everybody."""
        assert self.serve.alive(), f"the server is dead:\n{self.serve.log[mark:]}"
        self.works()
        self.witnessed()
        self.clean()
        said = self.serve.log[mark:]
        assert "Traceback" not in said and "qvm: error: " not in said, said

    def revive(self) -> None:
        """Start it again when an attack was too much for it, so that the others can be tried."""
        if self.serve.alive():
            return
        self.witness.close()
        self.serve.start()
        self._begin()

    def close(self) -> None:
        """The end, which has to be a good one."""
        self.witness.close()
        code = self.serve.stop()
        for memory in (self.memory, self._witness_memory):
            memory.close()
        assert code == 0, self.serve.log

    def said(self, pattern: str, mark: int) -> None:
        """Wait until the log has a line like this."""
        self._until(
            lambda: re.search(pattern, self.serve.log[mark:]),
            lambda: f"{pattern!r} in the log:\n{self.serve.log[mark:]}",
        )

    def _until(self, condition: Callable[[], object], what: str | Callable[[], str]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.serve.alive(), f"the server is dead:\n{self.serve.log}"
            assert time.monotonic() < deadline, f"never so: {what if isinstance(what, str) else what()}"
            time.sleep(0.005)


def check_reads(driver: VhostUserDriver) -> None:
    """Every queue of a running disk reads a sector."""
    for index, ring in enumerate(driver.queues):
        request = ring.submit([header(IN, 7 + index)], [512, 1])
        while not request.done:
            assert driver.wait(index), f"queue {index} does not answer"
            ring.reap()
        assert request.result() == bytes([7 + index]) * 512 + bytes([OK])


def verdict(client: Client) -> str:
    """What came of a message with NEED_REPLY: ``closed``, ``refused``, ``accepted`` or ``silent``."""
    try:
        answer = client.receive()
    except Closed:
        return "closed"
    except TimeoutError:
        return "silent"
    (value,) = U64.unpack(answer.payload[: U64.size].ljust(U64.size, b"\0"))
    return "refused" if value else "accepted"


def rejected(
    target: Target, client: Client, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()
) -> None:
    """The message is refused, or the connection closed, and the log says why in one line."""
    mark = len(target.serve.log)
    try:
        client.send(request, payload, fds, flags=VERSION | NEED_REPLY)
    except Closed:
        pass
    came = verdict(client)
    assert came in ("closed", "refused"), (
        f"{came}: {name(request)} {payload.hex()} with {len(fds)} descriptors"
    )
    target.said(r"disk: .{10}", mark)


def name(request: int) -> str:
    """Of a request."""
    return Request(request).name if request in set(Request) else str(request)


# ---- rings, message by message -------------------------------------------------------------------

#: Where the memory is for the client.
START, END = RAM[0].start + USER, RAM[0].end + USER
PACKED = 1 << 34


def mapped(target: Target, features: int = 1 << 32) -> Client:
    """A client whose memory is known."""
    client = target.client()
    client.negotiate()
    client.tell(Request.SET_FEATURES, U64.pack(features | 1 << 30))
    client.set_mem_table([target.region()])
    return client


def ring_up(client: Client, fds: list[int], *, number: int = 16, position: int = 0, kick: int = -1) -> None:
    """Start ring 0 at the begin of memory; raises when any step of it is refused."""
    if kick < 0:
        kick = os.eventfd(0, os.EFD_NONBLOCK)
        fds.append(kick)
    client.set_vring(Request.SET_VRING_NUM, 0, number)
    client.set_vring(Request.SET_VRING_BASE, 0, position)
    client.set_vring_addr(0, START, START + 0x2000, START + 0x1000)
    client.set_vring_fd(Request.SET_VRING_CALL, 0, None)
    client.set_vring_fd(Request.SET_VRING_KICK, 0, kick)
    client.set_vring(Request.SET_VRING_ENABLE, 0, 1)


def fails(target: Target, start: Callable[[], object]) -> None:
    """A step of it is refused, or ends the connection, and the log says why."""
    mark = len(target.serve.log)
    with pytest.raises((Refused, Closed)):
        start()
    target.said(r"disk: .{10}", mark)
