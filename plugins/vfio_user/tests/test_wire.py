"""Framing: what is a message, whose descriptors they are, and that none stays open."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from qvm_vfio_user import spec
from qvm_vfio_user.spec import Command
from qvm_vfio_user.testing import Gone
from qvm_vfio_user.wire import FDS_MAX, SHAPES, TEXT_MAX, Connection

from plugins.vfio_user.tests.vfio_bench import open_fds, serving
from qvmcore.api import ClientError


def request(command: int, payload: bytes = b"", number: int = 1, flags: int = 0) -> bytes:
    """A message as it goes over the wire."""
    return spec.HEADER.pack(number, command, spec.HEADER.size + len(payload), flags, 0) + payload


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        ours.settimeout(5)
        yield Connection(ours), theirs


def test_messages_that_arrive_together_are_taken_one_by_one(pair: tuple[Connection, socket.socket]) -> None:
    link, client = pair
    client.sendall(b"".join(request(Command.DEVICE_RESET, number=number) for number in range(400)))
    assert [link.receive().id for _ in range(400)] == list(range(400))  # type: ignore[union-attr]


def test_a_message_that_arrives_in_bytes_is_taken_when_it_is_whole(
    pair: tuple[Connection, socket.socket],
) -> None:
    link, client = pair
    body = os.urandom(5000)
    head = spec.ACCESS.pack(0, 0, len(body))
    data = request(Command.REGION_WRITE, head + body, number=7)
    for start in range(40):
        client.sendall(data[start : start + 1])
    assert link._read() == 40 and link._cut() is None
    client.sendall(data[40:])
    message = link.receive()
    assert message is not None and (message.id, message.payload) == (7, head + body)


def test_descriptors_belong_to_the_message_they_were_sent_with(
    pair: tuple[Connection, socket.socket],
) -> None:
    """Also when posted writes before it, and the beginning of the next one, are in the same read."""
    link, client = pair
    before = open_fds()
    read, write = os.pipe()
    posted = request(Command.REGION_WRITE, spec.ACCESS.pack(0, 0, 4) + bytes(4), flags=spec.NO_REPLY)
    client.sendall(posted * 2)
    socket.send_fds(client, [request(Command.DMA_MAP, bytes(spec.DMA_MAP.size))], [read])
    client.sendall(posted)
    os.close(read)
    counts = []
    for _ in range(4):
        message = link.receive()
        assert message is not None
        counts.append((message.name, len(message.fds)))
        message.fds.close()
    assert counts == [("REGION_WRITE", 0), ("REGION_WRITE", 0), ("DMA_MAP", 1), ("REGION_WRITE", 0)]
    os.close(write)
    assert open_fds() == before


def test_descriptors_of_a_message_that_is_not_whole_yet_stay_its_own(
    pair: tuple[Connection, socket.socket],
) -> None:
    link, client = pair
    client.sendall(request(Command.DEVICE_RESET, number=1))
    data = request(Command.DMA_MAP, bytes(spec.DMA_MAP.size), number=2)
    with open("/dev/null") as file:
        socket.send_fds(client, [data[:20]], [file.fileno()])
    message = link.receive()
    assert message is not None and (message.id, len(message.fds)) == (1, 0)
    client.sendall(data[20:] + request(Command.DEVICE_RESET, number=3))
    message = link.receive()
    assert message is not None and (message.id, len(message.fds)) == (2, 1)
    message.fds.close()
    message = link.receive()
    assert message is not None and (message.id, len(message.fds)) == (3, 0)


def test_descriptors_sent_with_the_rest_of_a_message_are_its_own(
    pair: tuple[Connection, socket.socket],
) -> None:
    link, client = pair
    data = request(Command.DMA_MAP, bytes(spec.DMA_MAP.size))
    client.sendall(data[:20])
    assert link._read() == 20
    with open("/dev/null") as file:
        socket.send_fds(client, [data[20:]], [file.fileno()])
    message = link.receive()
    assert message is not None and len(message.fds) == 1
    fd = message.fds.take()
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize("count", [2, FDS_MAX, FDS_MAX + 1, 253])
def test_DMA_MAP_with_too_many_descriptors_ends_the_connection_and_closes_them(count: int) -> None:
    before = open_fds()
    with serving() as bench:
        bench.client.version()
        with open("/dev/null") as file:
            data = request(Command.DMA_MAP, bytes(spec.DMA_MAP.size))
            socket.send_fds(bench.client.socket, [data], [file.fileno()] * count)
        wrong = "more descriptors came with a message" if count > FDS_MAX else f"with {count} descriptors"
        assert wrong in bench.broken()
    assert open_fds() == before


@pytest.mark.parametrize("command", [each for each in Command if each in SHAPES])
def test_a_message_of_the_wrong_size_ends_the_connection(command: Command) -> None:
    shape = SHAPES[command]
    for length in {shape.least - 1, shape.most + 1} - {-1}:
        with serving() as bench:
            if command != Command.VERSION:
                bench.client.version()
            # Only the header: what is wrong is known before the payload is read.
            bench.client.post(command, size=spec.HEADER.size + length)
            assert f"{command.name} with {length} bytes; expected {shape.least}" in bench.broken()


@pytest.mark.parametrize("size", [0, 15, 1 << 31, (1 << 32) - 1])
def test_a_header_whose_size_cannot_be_ends_the_connection(size: int) -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.post(99, size=size)
        expected = "the header alone has 16" if size < 16 else f"expected 0 to {TEXT_MAX}"
        assert expected in bench.broken()


@pytest.mark.parametrize(
    "flags, text",
    [(1, "a reply to"), (0x21, "a reply to"), (2, "flags 0x2"), (0x20, "flags 0x20"), (0x40, "flags 0x40")],
)
def test_flags_that_no_request_has_end_the_connection(flags: int, text: str) -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.post(Command.DEVICE_RESET, flags=flags)
        assert text in bench.broken()


def test_leaving_in_the_middle_of_a_message_is_said(pair: tuple[Connection, socket.socket]) -> None:
    link, client = pair
    client.sendall(request(Command.DEVICE_RESET)[:9])
    client.close()
    with pytest.raises(ClientError, match="9 bytes in"):
        link.receive()


def test_leaving_between_messages_is_nothing(pair: tuple[Connection, socket.socket]) -> None:
    link, client = pair
    client.close()
    assert link.receive() is None


def test_an_unknown_command_is_refused_and_the_connection_goes_on() -> None:
    with serving() as bench:
        bench.client.version()
        for command in (0, 14, 16, 17, 18, 6, 11, 12, 0xFFFF):
            reply = bench.client.ask(command, bytes(16))
            assert (reply.errno, reply.payload, reply.flags) == (errno.ENOTSUP, b"", 0x21)
        assert bench.client.info() == (3, 9, 3)


def test_a_posted_message_that_is_refused_gets_no_answer() -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.post(Command.REGION_WRITE, struct.pack("<QII", 0, 8, 0), flags=spec.NO_REPLY)
        bench.client.post(99, flags=spec.NO_REPLY)
        assert bench.client.info() == (3, 9, 3)


def test_shutdown_ends_a_session_that_waits_for_the_client_to_take_answers() -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            while True:
                bench.client.post(Command.REGION_READ, struct.pack("<QII", 0, 1, 4096))
        bench.connection.shutdown(socket.SHUT_RDWR)
        assert bench.ended() is None or isinstance(bench.error, ClientError)


def test_a_client_that_breaks_the_protocol_gets_an_error_before_the_end() -> None:
    with serving() as bench:
        bench.client.version()
        assert bench.client.ask(Command.VERSION, struct.pack("<HH", 0, 1)).errno == errno.EINVAL
        with pytest.raises(Gone):
            bench.client.info()
        assert "VERSION came twice" in bench.broken()


def test_a_connection_that_polls_reads_the_same_and_sees_the_end() -> None:
    ours, theirs = socket.socketpair()
    waited = []
    link = Connection(ours, lambda: waited.append(True), poll=0.001)
    with ours, theirs:
        for number in range(3):
            theirs.sendall(spec.HEADER.pack(number, spec.Command.DEVICE_RESET, spec.HEADER.size, 0, 0))
            message = link.receive()
            assert message is not None and message.id == number
        assert not waited
        theirs.close()
        assert link.receive() is None
