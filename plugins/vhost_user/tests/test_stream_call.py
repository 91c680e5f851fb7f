"""User Mode Linux misses signals while it falls asleep: what nobody took is said again."""

from __future__ import annotations

import os
import resource
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from qvm_vhost_user.notifier import Notifier
from qvm_vhost_user.stream_call import FIRST, LAST, StreamCall
from qvm_vhost_user.timer import Timer
from qvm_vhost_user.wire import Fd
from session_kit import descriptors

from qvmcore.api import ClientError, Worker

#: Most wake-ups that one signal makes: FIRST, twice, four times ... LAST.
MOST = 1 + (LAST // FIRST).bit_length()


@pytest.fixture
def worker() -> Iterator[Worker]:
    errors: list[BaseException] = []
    worker = Worker("test", errors.append)
    yield worker
    assert worker.stop(5)
    assert errors == []


@pytest.fixture(autouse=True)
def nothing_left_open(worker: Worker) -> Iterator[None]:
    before = descriptors()
    yield
    assert not descriptors() - before


@pytest.fixture
def far(call: StreamCall, ends: tuple[socket.socket, socket.socket]) -> socket.socket:
    return ends[1]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    yield pair
    pair[1].close()


@pytest.fixture
def due() -> threading.Semaphore:
    """Released whenever the timer has run out."""
    return threading.Semaphore(0)


@pytest.fixture
def call(
    ends: tuple[socket.socket, socket.socket], worker: Worker, due: threading.Semaphore
) -> Iterator[StreamCall]:
    call = StreamCall(ends[0], worker, due.release)
    yield call
    call.close()


def waiting(end: socket.socket) -> int:
    """How many wake-ups lie there; takes them."""
    try:
        return len(end.recv(1 << 16, socket.MSG_DONTWAIT)) // 8
    except BlockingIOError:
        return 0


def runs(call: StreamCall) -> bool:
    """Whether its timer is going to run out."""
    info = Path(f"/proc/self/fdinfo/{call._timer.fd}").read_text()
    return "it_value: (0, 0)" not in info


def test_what_was_not_taken_is_said_again_and_what_was_taken_is_not(
    call: StreamCall, far: socket.socket, due: threading.Semaphore
) -> None:
    call.send()
    assert due.acquire(timeout=5), "the timer did not run out"
    call.again()
    assert waiting(far) == 2
    assert due.acquire(timeout=5)
    call.again()
    assert waiting(far) == 0
    assert not runs(call)


def test_nobody_is_reminded_for_ever(call: StreamCall, far: socket.socket, due: threading.Semaphore) -> None:
    """A guest that stands still, or a client that never reads."""
    call.send()
    for _ in range(MOST - 1):
        assert due.acquire(timeout=5)
        call.again()
    assert due.acquire(timeout=5)
    call.again()
    call.again()
    assert waiting(far) == MOST
    assert not runs(call)
    call.send()
    assert due.acquire(timeout=5)
    call.again()
    assert waiting(far) == 2, "the next signal begins anew"


def test_a_notifier_reminds_by_its_worker_until_somebody_reads(worker: Worker) -> None:
    ours, far = socket.socketpair()
    notifier = Notifier(lambda: worker)
    notifier.set(Fd(ours.detach()))
    notifier.signal()
    data = b""
    far.settimeout(5)
    while len(data) < 16:
        # Not taken before there is more of it.
        data = far.recv(1 << 16, socket.MSG_PEEK)
    notifier.set(None)
    assert far.recv(1 << 16)[:16] == (1).to_bytes(8, "little") * 2
    assert far.recv(1) == b"", "closed, and silent"
    far.close()


def test_a_full_socket_and_one_without_another_end_are_no_errors(
    call: StreamCall, ends: tuple[socket.socket, socket.socket], far: socket.socket
) -> None:
    for _ in range(1 << 12):
        call.send()
    call.again()
    assert 0 < waiting(far) < 1 << 12
    far.close()
    call.send()
    call.again()


def test_without_a_descriptor_for_the_timer_the_client_is_told(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, far = socket.socketpair()
    notifier = Notifier(lambda: worker)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fd = Fd(ours.detach())
    resource.setrlimit(resource.RLIMIT_NOFILE, (_lowest_free(), limits[1]))
    try:
        with pytest.raises(ClientError, match="no timer for a call descriptor: Too many open files"):
            notifier.set(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert far.recv(1) == b"", "what came was closed"
    far.close()


def _lowest_free() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


def test_a_timer_that_is_started_again_runs_out_once() -> None:
    timer = Timer()
    timer.start(3_600_000_000)
    timer.start(100)
    poll = select.poll()
    poll.register(timer.fd, select.POLLIN)
    assert poll.poll(5000)
    assert os.read(timer.fd, 8) == (1).to_bytes(8, "little")
    assert not poll.poll(0)
    timer.close()
    timer.close()


def test_the_waits_reach_the_tick_of_user_mode_linux() -> None:
    """CONFIG_HZ=100: what is missed there waits for 10 ms at most."""
    assert FIRST <= 100 and LAST >= 10_000
