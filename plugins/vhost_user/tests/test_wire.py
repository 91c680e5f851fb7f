"""Messages on the socket: framing, lengths and descriptors ("Message Specification")."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from qvm_vhost_user.protocol import HEADER, NEED_REPLY, REPLY, SHAPES, VERSION, Request
from qvm_vhost_user.testing import Client
from qvm_vhost_user.wire import Fd, receive, reply
from session_kit import descriptors

from qvmcore.api import ClientError


@pytest.fixture
def ends() -> Iterator[tuple[Client, socket.socket]]:
    """A client, and the socket a server would read."""
    before = descriptors()
    one, other = socket.socketpair()
    with Client(one) as client, other:
        yield client, other
    assert not descriptors() - before


def test_a_message_has_request_flags_payload_and_descriptors(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    one, other = os.memfd_create("one"), os.memfd_create("other")
    try:
        client.send(Request.SET_MEM_TABLE, bytes(72), [one, other], flags=VERSION | NEED_REPLY)
        with receive(server) as message:  # type: ignore[union-attr]
            assert (message.request, message.need_reply, message.payload) == (5, True, bytes(72))
            assert [os.fstat(fd.number).st_ino for fd in message.fds] == [
                os.fstat(fd).st_ino for fd in (one, other)
            ]
            assert not any(os.get_inheritable(fd.number) for fd in message.fds)
            kept = Fd(message.fds[0].take())
        os.fstat(kept.number)
        kept.close()
        kept.close()
    finally:
        os.close(one)
        os.close(other)


def test_one_byte_at_a_time_is_a_message_too(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    for byte in HEADER.pack(Request.SET_FEATURES, VERSION, 8) + bytes(range(8)):
        client.send_raw(bytes([byte]))
    with receive(server) as message:  # type: ignore[union-attr]
        assert message.payload == bytes(range(8))


def test_two_messages_at_once_are_two(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    client.send_raw(
        HEADER.pack(Request.GET_FEATURES, VERSION, 0) + HEADER.pack(Request.SET_OWNER, VERSION, 0)
    )
    got = [receive(server), receive(server)]
    assert [message and message.request for message in got] == [1, 3]


def test_a_client_that_leaves_between_messages_ends_them(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    client.close()
    assert receive(server) is None


@pytest.mark.parametrize("count", range(1, 20))
def test_a_client_that_leaves_within_a_message(ends: tuple[Client, socket.socket], count: int) -> None:
    client, server = ends
    fd = os.memfd_create("left")
    client.send_raw((HEADER.pack(Request.SET_FEATURES, VERSION, 8) + bytes(8))[:count], [fd])
    os.close(fd)
    client.close()
    with pytest.raises(ClientError, match="left in the middle of a message"):
        receive(server)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_another_version_is_refused(ends: tuple[Client, socket.socket], version: int) -> None:
    client, server = ends
    client.send(Request.GET_FEATURES, flags=version)
    with pytest.raises(ClientError, match=f"a message of version {version}, expected 1"):
        receive(server)


def test_a_reply_is_no_request(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    client.send(Request.GET_FEATURES, flags=VERSION | REPLY)
    with pytest.raises(ClientError, match="GET_FEATURES is marked as a reply"):
        receive(server)


@pytest.mark.parametrize("number", [0, 6, 7, 19, 20, 22, 23, 26, 33, 35, 41, 44, 0xFFFF_FFFF])
def test_an_unknown_request_is_named(ends: tuple[Client, socket.socket], number: int) -> None:
    client, server = ends
    client.send(number)
    with pytest.raises(ClientError, match=f"request {number}, which is unknown"):
        receive(server)


@pytest.mark.parametrize("request_", list(Request), ids=lambda request: request.name)
def test_a_payload_of_a_wrong_length_is_refused_before_it_is_read(
    ends: tuple[Client, socket.socket], request_: Request
) -> None:
    client, server = ends
    shape = SHAPES[request_]
    wrong = {shape.least - 1, shape.most + 1, 0xFFFF_FFFF} - {-1}
    if shape.step > 1:
        wrong.add(shape.least + 1)
    for size in sorted(wrong):
        client.send_raw(HEADER.pack(request_, VERSION, size))
        with pytest.raises(ClientError, match=f"{request_.name} has a payload of {size} bytes, expected"):
            receive(server)


@pytest.mark.parametrize("request_", list(Request), ids=lambda request: request.name)
def test_descriptors_a_message_does_not_carry_are_closed_and_refused(
    ends: tuple[Client, socket.socket], request_: Request
) -> None:
    client, server = ends
    shape = SHAPES[request_]
    fd = os.memfd_create("flood")
    try:
        wrong = {0, 8} - set(range(shape.fds[0], shape.fds[1] + 1))
        assert wrong or request_ is Request.SET_MEM_TABLE
        for count in wrong:
            client.send(request_, bytes(shape.least), [fd] * count)
            with pytest.raises(ClientError, match=f"{request_.name} came with {count} descriptors, expected"):
                receive(server)
    finally:
        os.close(fd)


def test_a_flood_of_descriptors_is_refused_by_the_kernel(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    fd = os.memfd_create("flood")
    client.send(Request.SET_MEM_TABLE, bytes(8), [fd] * 200)
    os.close(fd)
    with pytest.raises(ClientError, match="more than 8 descriptors came at once"):
        receive(server)


def test_descriptors_may_come_with_the_payload(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    fd = os.eventfd(0)
    client.send_raw(HEADER.pack(Request.SET_VRING_KICK, VERSION, 8))
    client.send_raw(bytes(8), [fd])
    os.close(fd)
    with receive(server) as message:  # type: ignore[union-attr]
        assert len(message.fds) == 1


def test_an_answer_is_marked_as_one_and_may_carry_a_descriptor(ends: tuple[Client, socket.socket]) -> None:
    client, server = ends
    reply(server, Request.GET_FEATURES, struct.pack("=Q", 5))
    assert client.receive() == (1, VERSION | REPLY, struct.pack("=Q", 5), [])
    fd = os.memfd_create("answer")
    reply(server, Request.GET_INFLIGHT_FD, bytes(20), fd)
    answer = client.receive()
    assert os.fstat(answer.fds[0]).st_ino == os.fstat(fd).st_ino
    for each in (fd, *answer.fds):
        os.close(each)
