"""Descriptors for wake-ups (SET_VRING_KICK, CALL, ERR) and the channel of SET_BACKEND_REQ_FD."""

from __future__ import annotations

import logging
import os
import select
import socket
import tempfile
from collections.abc import Callable

import pytest
from qvm_vhost_user.channel import BackendChannel
from qvm_vhost_user.notifier import Notifier, check_call, check_kick
from qvm_vhost_user.testing import BackendChannel as FarEnd
from qvm_vhost_user.wire import Fd

from qvmcore.api import ClientError, Worker

Check = Callable[[Fd, str], None]
LOG = logging.LoggerAdapter(logging.getLogger("qvm.vdev.test"), {})

pytestmark = pytest.mark.usefixtures("nothing_left_open")


def nobody() -> Worker:
    """Only sockets need a worker."""
    raise AssertionError("asked for a worker")


def folder() -> int:
    return os.open("/", os.O_RDONLY)


def file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def null() -> int:
    return os.open(os.devnull, os.O_RDWR)


def epoll() -> int:
    with select.epoll() as poll:
        return os.dup(poll.fileno())


def datagram() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()


def internet() -> int:
    return socket.socket(socket.AF_INET).detach()


def stream() -> int:
    return socket.socket(socket.AF_UNIX).detach()


@pytest.mark.parametrize(
    "make", [folder, file, null, epoll, datagram, internet, lambda: os.memfd_create("x")]
)
@pytest.mark.parametrize("check", [check_call, check_kick])
def test_what_may_block_or_never_be_ready_is_no_wake_up(make: Callable[[], int], check: Check) -> None:
    fd = Fd(make())
    with pytest.raises(ClientError, match=r"the fd is .*, expected an eventfd"):
        check(fd, "the fd")
    fd.close()


def test_a_call_may_be_a_socket_or_a_pipe_and_never_waits() -> None:
    reader, writer = map(Fd, os.pipe())
    event, far = Fd(os.eventfd(0)), Fd(stream())
    for fd in (writer, event, far):
        check_call(fd, "the call")
        assert not os.get_blocking(fd.number)
    with pytest.raises(ClientError, match="the call cannot be written"):
        check_call(reader, "the call")
    for fd in (reader, writer, event, far):
        fd.close()


def test_a_kick_is_an_eventfd_and_stays_as_it_is() -> None:
    """Nothing is read from it, which a pipe would need: it fills."""
    event, far, (reader, writer) = Fd(os.eventfd(0)), Fd(stream()), map(Fd, os.pipe())
    check_kick(event, "the kick")
    assert os.get_blocking(event.number)
    for fd in (reader, far):
        with pytest.raises(ClientError, match=r"the kick is (pipe|socket):.*, expected an eventfd"):
            check_kick(fd, "the kick")
    for fd in (event, far, reader, writer):
        fd.close()


def test_a_signal_is_eight_bytes_and_never_waits() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    notifier = Notifier(nobody)
    notifier.signal()
    notifier.set(Fd(writer))
    notifier.signal()
    assert os.read(reader, 100) == (1).to_bytes(8, "little")
    for _ in range(65536 // 8 + 10):
        notifier.signal()
    os.close(reader)
    notifier.signal()
    notifier.signal()
    notifier.set(None)


def test_a_descriptor_that_is_replaced_is_closed_and_silent() -> None:
    one, other = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    seen = os.dup(one)
    notifier = Notifier(nobody)
    notifier.set(Fd(one))
    notifier.set(Fd(other))
    notifier.signal()
    assert os.eventfd_read(other) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(seen)
    notifier.set(None)
    os.close(seen)


# ---- SET_BACKEND_REQ_FD ------------------------------------------------------------------------------


def channel_and_far_end() -> tuple[BackendChannel, FarEnd]:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(LOG)
    channel.set(Fd(ours.detach()))
    return channel, FarEnd(theirs)


def test_CONFIG_CHANGE_is_sent_on_the_channel() -> None:
    channel, far = channel_and_far_end()
    channel.config_changed()
    channel.config_changed()
    assert far.poll(1.0) == 2
    channel.close()
    channel.close()
    channel.config_changed()
    far.close()


def test_CONFIG_CHANGE_is_dropped_with_one_line_when_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    channel, far = channel_and_far_end()
    for _ in range(20000):
        channel.config_changed()
    assert [record.message for record in caplog.records] == [
        "the client does not read; it is not told of configuration changes"
    ]
    told = far.poll()
    assert 0 < told < 20000
    channel.config_changed()
    assert far.poll(1.0) == told + 1, "once it reads, it is told again"
    channel.close()
    far.close()


def test_CONFIG_CHANGE_to_a_client_that_closed_its_end_is_forgotten() -> None:
    channel, far = channel_and_far_end()
    far.close()
    channel.config_changed()
    channel.config_changed()
    channel.close()


def test_SET_BACKEND_REQ_FD_again_replaces_the_channel() -> None:
    channel, far = channel_and_far_end()
    ours, theirs = socket.socketpair()
    channel.set(Fd(ours.detach()))
    channel.config_changed()
    second = FarEnd(theirs)
    assert (far.poll(), second.poll(1.0)) == (0, 1)
    for each in (channel, far, second):
        each.close()


@pytest.mark.parametrize("make", [folder, file, null, datagram, internet, lambda: os.eventfd(0)])
def test_SET_BACKEND_REQ_FD_takes_unix_stream_sockets_only(make: Callable[[], int]) -> None:
    channel, fd = BackendChannel(LOG), Fd(make())
    with pytest.raises(ClientError, match="no Unix stream socket"):
        channel.set(fd)
    fd.close()
