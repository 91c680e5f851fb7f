"""The link to a server against a library that does what real ones do only now and then."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from qvm_virtio_blk import link as link_module
from qvm_virtio_blk.libnbd import READ
from qvm_virtio_blk.link import Link

from qvmcore.api import HostError, Worker

LOG = logging.LoggerAdapter(logging.getLogger("qvm.vdev.test"), {})


class Fake:
    """A connection whose first address refuses; the socket of the second gets the same number."""

    readonly = False

    def __init__(self, uri: str) -> None:
        self.ready = self.dead = False
        self.direction = READ
        self.steps = 0
        self._pair = self._open()

    def _open(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        theirs.send(b"x")
        return ours, theirs

    def fileno(self) -> int:
        return self._pair[0].fileno()

    def notify(self, readable: bool, writable: bool) -> None:
        if not readable:
            return
        self.steps += 1
        if self.steps == 1:
            number = self.fileno()
            self.close()
            self._pair = self._open()
            if self.fileno() != number:
                os.dup2(self.fileno(), number)
            assert self.fileno() == number
        else:
            self._pair[0].recv(1)
            self.ready = True

    def describe(self) -> None:
        """Nothing to tell."""

    def close(self) -> None:
        for end in self._pair:
            end.close()


class Owner:
    """Accepts every export."""

    def __init__(self) -> None:
        self.up = threading.Event()

    def check_export(self, connection: object) -> None: ...
    def link_moved(self, connection: object) -> None: ...
    def link_down(self) -> None: ...
    def link_settled(self) -> None: ...
    def link_up(self, connection: object) -> None:
        self.up.set()


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker whose callbacks must not raise."""
    errors: list[BaseException] = []
    worker = Worker("test", errors.append)
    yield worker
    worker.stop(2)
    assert not errors


def test_the_next_address_may_have_a_socket_of_the_same_number(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "Connection", Fake)
    owner = Owner()
    link = Link("nbd://two-addresses/", owner, worker, LOG)
    closed = threading.Event()

    def begin() -> None:
        assert not link.attempt()

    worker.call(begin)
    assert owner.up.wait(5)
    worker.call(link.close)
    worker.call(closed.set)
    assert closed.wait(5)


def test_a_server_that_never_answers_is_given_up(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        link = Link(f"nbd://127.0.0.1:{silent.getsockname()[1]}/", Owner(), worker, LOG)
        with pytest.raises(HostError, match="the server does not answer"):
            link.connect_now()
        with pytest.raises(HostError, match="the server does not answer"):
            while not link.attempt():
                pass
