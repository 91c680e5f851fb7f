"""Asking a keeper."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from qvm_quiesce import keeper

NAME = f"\0qvm-test-keeper-{os.getpid()}"


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What a keeper listens with; it does not yet."""
    monkeypatch.setattr(keeper, "_address", lambda pid: NAME)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(5)
        yield listener


def test_one_that_does_not_listen_yet_is_waited_for(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qvm quiesce run` right after the end of a VM."""

    def answer() -> None:
        with listener.accept()[0] as channel:
            keeper._answer(channel, {})

    thread = threading.Thread(target=answer)

    def begin(_seconds: float) -> None:
        listener.bind(NAME)
        listener.listen()
        thread.start()

    # The name in that module, not the function: other threads sleep as well.
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=time.monotonic, sleep=begin))
    with pytest.raises(keeper.KeeperError, match="it does not hold this device for us"):
        keeper.ask(os.getpid(), "0000:00:1f.0")
    thread.join(5)


def test_one_that_never_listens_is_given_up(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PATIENCE", 0.05)
    with pytest.raises(keeper.KeeperError, match="Connection refused"):
        keeper.ask(os.getpid(), "0000:00:1f.0")
