"""Clients that leave at any moment, come in crowds, or come two at a time."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from typing import NamedTuple

import pytest
from hostile_kit import QUEUE_SIZE, Target, check_reads
from qvm_vhost_user.protocol import (
    ADDRESS,
    CONFIG,
    HEADER,
    INFLIGHT,
    NEED_REPLY,
    REGION,
    STATE,
    TABLE,
    U64,
    VERSION,
    ProtocolFeature,
    Request,
)
from qvm_vhost_user.testing import ALL_FEATURES, FDS_MAX, Client, Closed
from qvm_vhost_user.testing_driver import USER
from qvm_virtio_blk.testing import IN, header

from qvmcore.testing.driver import GuestRam, SplitDriver

#: How many bad connections the crowd is: some 12 s for those of the promise.
CROWD = int(os.environ.get("QVM_BAD_CONNECTIONS", "10000"))


class Part(NamedTuple):
    """A message of a good client, and whether there is an answer to it."""

    data: bytes
    fds: list[int]
    answered: bool


def message(request: Request, payload: bytes = b"", fds: list[int] | None = None) -> Part:
    """One of them, to be acknowledged where that is in force."""
    plain = request in (Request.SET_OWNER, Request.SET_PROTOCOL_FEATURES)
    flags = VERSION if plain or request.name.startswith("GET") else VERSION | NEED_REPLY
    answered = not plain
    return Part(HEADER.pack(request, flags, len(payload)) + payload, fds or [], answered)


def play(client: Client, parts: list[Part], *, wait: bool) -> None:
    """Say it all; ``wait`` for every answer, or for none."""
    for part in parts:
        client.send_raw(part.data, part.fds)
        if wait and part.answered:
            answer = client.receive()
            for fd in answer.fds:
                os.close(fd)
            (request,) = struct.unpack_from("=I", part.data)
            assert answer.request == request
            if not Request(request).name.startswith("GET"):
                assert answer.payload == bytes(8), f"{Request(request).name} was refused"


def good_life(target: Target, fds: list[int]) -> list[Part]:
    """Everything a client says from the first message to the last; requests wait in ring 0."""
    ring = SplitDriver(GuestRam(target.memory), QUEUE_SIZE)
    for sector in range(8):
        ring.add([header(IN, sector)], [512, 1])
    ring.publish()
    ours, theirs = socket.socketpair()
    kick, call, err = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    os.eventfd_write(kick, 1)
    inflight, memory = os.memfd_create("inflight"), target.region()
    os.ftruncate(inflight, 1 << 20)
    fds += [ours.detach(), theirs.detach(), kick, call, err, inflight]
    backend = fds[-5]
    described = INFLIGHT.pack(0x8000, 0, 2, QUEUE_SIZE)
    addresses = ADDRESS.pack(0, 0, ring.desc + USER, ring.used + USER, ring.avail + USER, 0)
    return [
        message(Request.SET_OWNER),
        message(Request.GET_FEATURES),
        message(Request.GET_PROTOCOL_FEATURES),
        message(Request.SET_PROTOCOL_FEATURES, U64.pack(ALL_FEATURES)),
        message(Request.GET_QUEUE_NUM),
        message(Request.GET_CONFIG, CONFIG.pack(0, 60, 0) + bytes(60)),
        message(Request.SET_BACKEND_REQ_FD, b"", [backend]),
        message(Request.SET_FEATURES, U64.pack(1 << 32 | 1 << 30)),
        message(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 2, QUEUE_SIZE)),
        message(Request.SET_INFLIGHT_FD, described, [inflight]),
        message(Request.SET_MEM_TABLE, TABLE.pack(1, 0) + memory.pack(), [memory.fd]),
        message(Request.SET_VRING_NUM, STATE.pack(0, QUEUE_SIZE)),
        message(Request.SET_VRING_BASE, STATE.pack(0, 0)),
        message(Request.SET_VRING_ADDR, addresses),
        message(Request.SET_VRING_CALL, U64.pack(0), [call]),
        message(Request.SET_VRING_ERR, U64.pack(0), [err]),
        message(Request.SET_VRING_KICK, U64.pack(0), [kick]),
        message(Request.SET_VRING_ENABLE, STATE.pack(0, 1)),
        message(Request.SET_STATUS, U64.pack(15)),
        message(Request.SET_VRING_ENABLE, STATE.pack(0, 0)),
        message(Request.SET_VRING_ENABLE, STATE.pack(0, 1)),
        message(Request.GET_VRING_BASE, STATE.pack(0, 0)),
        message(Request.RESET_DEVICE),
        message(Request.GET_STATUS),
    ]


def leave(client: Client) -> None:
    """Say no more, and wait until the server has seen it: a crowd in the queue would be turned away."""
    try:
        client.socket.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the server went first
    assert client.closed(), "the server does not let the client go"


def test_the_good_life_is_good(target: Target, fds: list[int]) -> None:
    """What the tests below cut short is accepted as a whole."""
    with target.client() as client:
        play(client, good_life(target, fds), wait=True)


@pytest.mark.parametrize("wait", [False, True], ids=["at-once", "answers-read"])
def test_leaving_between_any_two_messages(target: Target, fds: list[int], wait: bool) -> None:
    for end in range(len(good_life(target, fds)) + 1):
        with target.client() as client:
            play(client, good_life(target, fds)[:end], wait=wait)
            if end % 2:
                leave(client)
        target.witnessed()


def test_leaving_inside_any_message(target: Target, fds: list[int]) -> None:
    """At the edges of header and payload, with and without the descriptors."""
    mark = len(target.serve.log)
    for number, part in enumerate(good_life(target, fds)):
        for cut in sorted({1, HEADER.size - 1, HEADER.size, HEADER.size + 1, len(part.data) - 1}):
            if cut >= len(part.data):
                continue
            with target.client() as client:
                play(client, good_life(target, fds)[:number], wait=False)
                client.send_raw(part.data[:cut], part.fds)
                leave(client)
    target.said("in the middle of a message", mark)


def bad(client: Client, rng: random.Random, fds: list[int], life: list[Part]) -> None:
    """Something bad, a different thing each time."""
    kind = rng.randrange(6)
    if kind == 0:
        client.send_raw(rng.randbytes(rng.randrange(1, 64)))
    elif kind == 1:
        client.send(Request.SET_MEM_TABLE, bytes(8), fds[:1] * FDS_MAX)
    elif kind == 2:
        client.send(rng.choice(list(Request)), rng.randbytes(rng.randrange(64)), fds[: rng.randrange(3)])
    elif kind == 3:
        play(client, life[: rng.randrange(len(life))], wait=False)
        client.send(Request.SET_VRING_NUM, STATE.pack(0, 3))
    elif kind == 4:
        play(client, life[:11], wait=False)
        client.send(Request.SET_MEM_TABLE, TABLE.pack(1, 0) + REGION.pack(0, 1 << 62, 0, 0), fds[:1])
    elif kind == 5:
        client.send(Request.GET_FEATURES, size=1 << 31)


def test_a_crowd_of_bad_clients_leaves_nothing(target: Target, fds: list[int]) -> None:
    """QVM_BAD_CONNECTIONS makes it a smaller crowd."""
    life = good_life(target, fds)
    rng = random.Random(1)
    begin = time.monotonic()
    for number in range(CROWD):
        with target.client() as client:
            try:
                bad(client, rng, fds, life)
            except Closed:
                pass
            if number % 2:
                leave(client)
        if number % 500 == 0:
            target.witnessed()
    target.works()
    target.clean()
    print(f"{CROWD} bad connections in {time.monotonic() - begin:.1f} s")


def test_a_second_client_is_turned_away_and_the_first_never_notices(target: Target) -> None:
    mark = len(target.serve.log)
    with target.driver() as driver:
        driver.start()
        for _ in range(20):
            with target.client() as second:
                assert second.closed(), "the second client is served"
        check_reads(driver)
    target.said("disk: a second client was turned away", mark)


def test_whoever_comes_after_the_first_has_left_is_served(target: Target) -> None:
    """At once, although the life of the first is still being ended."""
    for _ in range(20):
        driver = target.driver()
        with driver:
            driver.start()
            check_reads(driver)


def test_clients_that_say_nothing_do_not_pile_up(target: Target) -> None:
    """A crowd that waits while one is served: turned away, not kept."""
    with target.driver() as driver:
        driver.start()
        crowd = [target.client() for _ in range(100)]
        assert all(client.closed() for client in crowd)
        for client in crowd:
            client.close()
        check_reads(driver)


def test_every_protocol_feature_is_offered(target: Target) -> None:
    """Those the attacks above are about."""
    with target.client() as client:
        client.negotiate()
        assert all(client.has(feature) for feature in ProtocolFeature)
