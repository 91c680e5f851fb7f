"""Messages that are none: wrong headers, lengths and numbers of descriptors, and lies in small requests."""

from __future__ import annotations

import os
import socket
import struct

import pytest
from hostile_kit import Target, rejected, verdict
from qvm_vhost_user.protocol import (
    ADDRESS,
    CONFIG,
    HEADER,
    INFLIGHT,
    NEED_REPLY,
    REPLY,
    SHAPES,
    STATE,
    U64,
    VERSION,
    Request,
)
from qvm_vhost_user.testing import FDS_MAX, Client, Closed

VERSION_1 = 1 << 32


def greeted(target: Target) -> Client:
    """A client that has negotiated everything."""
    client = target.client()
    client.negotiate()
    client.tell(Request.SET_FEATURES, U64.pack(VERSION_1 | 1 << 30))
    return client


def ends(target: Target, client: Client, mark: int) -> None:
    """The server closes the connection and says why."""
    assert client.closed(), "the connection is still open"
    target.said(r"disk: connection closed: .{10}", mark)
    client.close()


@pytest.mark.parametrize(
    "flags", [0, 2, 3, VERSION | REPLY, VERSION | REPLY | NEED_REPLY], ids=lambda flags: f"{flags:#x}"
)
def test_a_header_with_wrong_flags_closes(target: Target, flags: int) -> None:
    mark = len(target.serve.log)
    client = greeted(target)
    client.send(Request.GET_FEATURES, flags=flags)
    ends(target, client, mark)


@pytest.mark.parametrize("size", [1, 8, 4096, 0x1_0000, 0x7FFF_FFFF, 0xFFFF_FFFF], ids=hex)
def test_a_payload_announced_where_none_belongs_closes(target: Target, size: int) -> None:
    mark = len(target.serve.log)
    client = target.client()
    client.send(Request.GET_FEATURES, size=size)
    ends(target, client, mark)


@pytest.mark.parametrize("request_", sorted(SHAPES), ids=lambda request: request.name)
def test_a_payload_of_every_wrong_length_closes(target: Target, request_: Request) -> None:
    """None, one byte less, one more, and far more."""
    shape = SHAPES[request_]
    for size in {0, shape.least - 1, shape.least + 1, shape.most + 1, shape.most + shape.step, 60_000}:
        if size < 0 or shape.fits(size):
            continue
        mark = len(target.serve.log)
        client = greeted(target)
        try:
            client.send(request_, bytes(size))
        except Closed:
            pass  # it need not wait for all of it
        ends(target, client, mark)


@pytest.mark.parametrize(
    "number", [0, 6, 7, 19, 20, 22, 23, 26, 27, 28, 29, 30, 33, 35, 41, 100, 0xFFFF_FFFF], ids=str
)
def test_a_request_nobody_offered_is_refused(target: Target, number: int) -> None:
    for payload in (b"", bytes(8)):
        with greeted(target) as client:
            rejected(target, client, number, payload)


@pytest.mark.parametrize(
    "request_",
    [
        Request.GET_CONFIG,
        Request.SET_CONFIG,
        Request.GET_INFLIGHT_FD,
        Request.SET_INFLIGHT_FD,
        Request.RESET_DEVICE,
        Request.GET_MAX_MEM_SLOTS,
        Request.ADD_MEM_REG,
        Request.REM_MEM_REG,
        Request.SET_STATUS,
        Request.GET_STATUS,
        Request.SET_BACKEND_REQ_FD,
    ],
    ids=lambda request: request.name,
)
def test_what_was_not_negotiated_is_refused(target: Target, request_: Request, fds: list[int]) -> None:
    mark = len(target.serve.log)
    fds.append(os.eventfd(0))
    client = target.client()
    client.send(request_, bytes(SHAPES[request_].least), fds * SHAPES[request_].fds[0])
    ends(target, client, mark)


TOO_MANY = [
    pytest.param(request, count, id=f"{request.name}-{count}")
    for request in sorted(SHAPES)
    for count in (1, 2, 9, FDS_MAX)
    if count > SHAPES[request].fds[1]
]


@pytest.mark.parametrize(("request_", "count"), TOO_MANY)
def test_more_descriptors_than_belong_there(
    target: Target, request_: Request, count: int, fds: list[int]
) -> None:
    """Refused or not, none of them is left."""
    fds.append(os.eventfd(0))
    with greeted(target) as client:
        client.send(request_, bytes(SHAPES[request_].least), fds * count, flags=VERSION | NEED_REPLY)
        assert verdict(client) in ("closed", "refused")


@pytest.mark.parametrize(
    "request_",
    [Request.SET_BACKEND_REQ_FD, Request.SET_INFLIGHT_FD, Request.ADD_MEM_REG],
    ids=lambda request: request.name,
)
def test_no_descriptor_where_one_belongs(target: Target, request_: Request) -> None:
    with greeted(target) as client:
        rejected(target, client, request_, bytes(SHAPES[request_].least))


@pytest.mark.parametrize("flood", [8, FDS_MAX])
def test_descriptors_with_every_byte_of_a_message_that_never_ends(
    target: Target, flood: int, fds: list[int]
) -> None:
    """They cannot use up what the other devices need."""
    fds.append(os.eventfd(0))
    message = HEADER.pack(Request.SET_MEM_TABLE, VERSION, 264) + bytes(260)
    with target.client() as client:
        try:
            for byte in message:
                client.send_raw(bytes([byte]), fds * flood)
        except (Closed, TimeoutError):
            pass
        more = target.resources()[0].total() - target.baseline[0].total()
        assert more < 64, f"the server holds {more} descriptors of one message"
        target.witnessed()


def test_a_message_byte_by_byte_is_a_message(target: Target) -> None:
    with target.client() as client:
        for byte in HEADER.pack(Request.GET_FEATURES, VERSION, 0):
            client.send_raw(bytes([byte]))
        assert client.receive().request == Request.GET_FEATURES


def test_messages_at_once_are_answered_one_by_one(target: Target) -> None:
    with target.client() as client:
        client.send_raw(HEADER.pack(Request.GET_FEATURES, VERSION, 0) * 50)
        assert [client.receive().request for _ in range(50)] == [Request.GET_FEATURES] * 50


def test_a_client_that_never_reads_answers_harms_nobody(target: Target) -> None:
    """The server may wait for it, until it leaves."""
    with target.client(0.5) as client:
        with pytest.raises((TimeoutError, Closed)):
            while True:
                client.send_raw(HEADER.pack(Request.GET_FEATURES, VERSION, 0) * 1000)
        target.witnessed()


def test_a_stream_of_another_protocol_closes(target: Target) -> None:
    mark = len(target.serve.log)
    client = target.client()
    client.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    ends(target, client, mark)


@pytest.mark.parametrize("cut", range(1, HEADER.size + U64.size))
def test_an_end_in_the_middle_of_a_message(target: Target, cut: int) -> None:
    mark = len(target.serve.log)
    client = target.client()
    client.send_raw((HEADER.pack(Request.SET_FEATURES, VERSION, 8) + U64.pack(VERSION_1))[:cut])
    client.socket.shutdown(socket.SHUT_WR)
    ends(target, client, mark)


@pytest.mark.parametrize(
    "features", [0, VERSION_1 | 1 << 50, (1 << 64) - 1, VERSION_1 | 1 << 63, 1 << 30], ids=hex
)
def test_features_that_cannot_be_accepted(target: Target, features: int) -> None:
    with target.client() as client:
        client.negotiate()
        rejected(target, client, Request.SET_FEATURES, U64.pack(features))


@pytest.mark.parametrize("features", [1 << 1, 1 << 8, 1 << 40, (1 << 64) - 1], ids=hex)
def test_protocol_features_nobody_offered(target: Target, features: int) -> None:
    mark = len(target.serve.log)
    client = target.client()
    client.tell(Request.SET_OWNER)
    client.send(Request.SET_PROTOCOL_FEATURES, U64.pack(features))
    ends(target, client, mark)


@pytest.mark.parametrize(
    ("offset", "size", "sent"),
    [
        (0, 0, 0),
        (0, 8, 0),
        (0, 0, 8),
        (0xFFFF_FFFF, 8, 8),
        (0xFFFF_FFF8, 8, 8),
        (0, 0xFFFF_FFFF, 8),
        (255, 8, 8),
        (256, 8, 8),
    ],
)
@pytest.mark.parametrize(
    "request_", [Request.GET_CONFIG, Request.SET_CONFIG], ids=lambda request: request.name
)
def test_configuration_accesses_outside(
    target: Target, request_: Request, offset: int, size: int, sent: int
) -> None:
    """Nothing of what is not configuration is told; a good access works afterwards, if it is still there."""
    with greeted(target) as client:
        client.send(request_, CONFIG.pack(offset, size, 0) + bytes(sent), flags=VERSION | NEED_REPLY)
        try:
            answer = client.receive()
            if request_ == Request.GET_CONFIG:
                assert not any(answer.payload[CONFIG.size :])
            assert client.get_config(0, 8) == struct.pack("<Q", 128)
        except Closed:
            pass


@pytest.mark.parametrize("offset", [0, 20, 34])
def test_read_only_configuration_stays_as_it_is(target: Target, offset: int) -> None:
    with greeted(target) as client:
        before = client.get_config(0, 60)
        client.send(Request.SET_CONFIG, CONFIG.pack(offset, 4, 0) + b"\xa5" * 4, flags=VERSION | NEED_REPLY)
        if verdict(client) != "closed":
            assert client.get_config(0, 60) == before


@pytest.mark.parametrize("status", [1 << 32, (1 << 64) - 1, 0x80, 0x40, 0xFF, 4], ids=hex)
def test_a_status_out_of_order(target: Target, status: int) -> None:
    """Whatever comes of it, it stays a status."""
    with target.client() as client:
        client.negotiate()
        client.send(Request.SET_STATUS, U64.pack(status), flags=VERSION | NEED_REPLY)
        if verdict(client) != "closed":
            assert client.ask_u64(Request.GET_STATUS) <= 0xFF


@pytest.mark.parametrize(
    ("queues", "size"), [(0, 128), (1, 0), (0xFFFF, 128), (2, 0xFFFF), (0xFFFF, 0xFFFF), (3, 128)]
)
def test_an_in_flight_buffer_for_queues_there_are_not(target: Target, queues: int, size: int) -> None:
    """Refused, or of a size in proportion to the device."""
    with greeted(target) as client:
        client.send(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, size))
        try:
            answer = client.receive()
        except Closed:
            return
        for fd in answer.fds:
            assert os.fstat(fd).st_size <= 1 << 20
            os.close(fd)


@pytest.mark.parametrize("index", [2, 255, 256, 0x100 | 2, 0xFFFF_FFFF], ids=hex)
@pytest.mark.parametrize(
    "request_",
    [
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.SET_VRING_ENABLE,
        Request.GET_VRING_BASE,
        Request.SET_VRING_ADDR,
    ],
    ids=lambda request: request.name,
)
def test_a_ring_the_device_does_not_have(target: Target, request_: Request, index: int) -> None:
    payload = (
        ADDRESS.pack(index, 0, 0, 0, 0, 0) if request_ == Request.SET_VRING_ADDR else STATE.pack(index, 1)
    )
    with greeted(target) as client:
        rejected(target, client, request_, payload)


@pytest.mark.parametrize("index", [2, 0xFF, 0x200, 1 << 32, (1 << 64) - 1], ids=hex)
@pytest.mark.parametrize(
    "request_",
    [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR],
    ids=lambda request: request.name,
)
def test_a_descriptor_for_a_ring_the_device_does_not_have(
    target: Target, request_: Request, index: int, fds: list[int]
) -> None:
    fds.append(os.eventfd(0))
    with greeted(target) as client:
        rejected(target, client, request_, U64.pack(index), tuple(fds))
