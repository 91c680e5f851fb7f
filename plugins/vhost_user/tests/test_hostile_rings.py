"""Rings where none can be, descriptors that cannot ring, and buffers of in-flight requests full of lies."""

from __future__ import annotations

import os
import random
import select
import socket
import tempfile
import time
from collections.abc import Callable

import pytest
from hostile_kit import QUEUE_SIZE, Target, check_reads, rejected, verdict
from qvm_vhost_user.protocol import ADDRESS, INFLIGHT, NEED_REPLY, NO_FD, STATE, U64, VERSION, Request
from qvm_vhost_user.testing import Client, Closed, Refused, Region
from qvm_vhost_user.testing_driver import USER, VhostUserDriver
from qvm_virtio_blk.testing import IN, header

from qvmcore.testing.fakes import RAM

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


@pytest.mark.parametrize("number", [0, 3, 127, 0x8000, 0xFFFF, 0x1_0000, 0xFFFF_FFFF], ids=hex)
def test_a_size_that_cannot_be(target: Target, number: int, fds: list[int]) -> None:
    with mapped(target) as client:
        fails(target, lambda: ring_up(client, fds, number=number))


@pytest.mark.parametrize("position", [1, 17, 0x8000, 0xFFFF, 0x1_0000, 0xFFFF_FFFF], ids=hex)
@pytest.mark.parametrize("features", [1 << 32, 1 << 32 | PACKED], ids=["split", "packed"])
def test_a_position_out_of_the_blue(target: Target, position: int, features: int, fds: list[int]) -> None:
    """Refused, or a ring with nothing in it; never a chain of what was not offered."""
    target.memory.write(RAM[0].start, bytes(0x4000))
    with mapped(target, features) as client:
        try:
            ring_up(client, fds, position=position)
            os.eventfd_write(fds[-1], 1)
            client.ask_u64(Request.GET_FEATURES)
        except (Refused, Closed):
            pass


PLACES = {
    "zero": (0, 0, 0),
    "guest addresses": (RAM[0].start, RAM[0].start + 0x2000, RAM[0].start + 0x1000),
    "behind the end": (END, END, END),
    "over the end": (END - 16, START, START + 0x1000),
    "used over the end": (START, END - 2, START + 0x1000),
    "available over the end": (START, START + 0x2000, END - 2),
    "at the top": ((1 << 64) - 16, (1 << 64) - 16, (1 << 64) - 16),
    "wrapped": ((1 << 64) - 0x1000, START, START + 0x1000),
    "unaligned descriptors": (START + 1, START + 0x2000, START + 0x1000),
    "unaligned used": (START, START + 0x2001, START + 0x1000),
    "unaligned available": (START, START + 0x2000, START + 0x1001),
    "outside": (0x1000, 0x2000, 0x3000),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("features", [1 << 32, 1 << 32 | PACKED], ids=["split", "packed"])
def test_rings_where_none_can_be(
    target: Target, places: tuple[int, int, int], features: int, fds: list[int]
) -> None:
    fds.append(os.eventfd(0, os.EFD_NONBLOCK))
    if features & PACKED and places[0] == START and places[1] == START + 0x2001:
        places = (START, START + 0x2002, START + 0x1000)

    def start() -> None:
        client.set_vring(Request.SET_VRING_NUM, 0, 16)
        client.set_vring_addr(0, *places)
        client.set_vring_fd(Request.SET_VRING_KICK, 0, fds[-1])
        client.set_vring(Request.SET_VRING_ENABLE, 0, 1)
        client.ask_u64(Request.GET_FEATURES)

    with mapped(target, features) as client:
        fails(target, start)


@pytest.mark.parametrize("features", [False, True])
def test_rings_without_features_or_without_memory(target: Target, features: bool, fds: list[int]) -> None:
    with target.client() as client:
        client.negotiate()
        if features:
            client.tell(Request.SET_FEATURES, U64.pack(1 << 32 | 1 << 30))
        fails(target, lambda: ring_up(client, fds))


def test_rings_before_anything(target: Target, fds: list[int]) -> None:
    """Without REPLY_ACK there is no way to refuse but the log."""
    mark = len(target.serve.log)
    with target.client() as client:
        ring_up(client, fds)
        target.said(r"disk: SET_VRING_ENABLE refused: .{10}", mark)


def test_a_ring_that_runs_is_started_again(target: Target, fds: list[int]) -> None:
    """Whatever comes of it, it is said or harmless."""
    target.memory.write(RAM[0].start, bytes(0x4000))
    with mapped(target) as client:
        ring_up(client, fds)
        try:
            ring_up(client, fds)
            client.set_vring(Request.SET_VRING_NUM, 0, 32)
            client.set_vring_addr(0, START + 0x8000, START + 0xA000, START + 0x9000)
            client.ask_u64(Request.GET_FEATURES)
        except (Refused, Closed):
            pass


def test_a_ring_is_stopped_that_never_ran(target: Target) -> None:
    with mapped(target) as client:
        try:
            assert client.get_vring_base(0) in (0, 0x8000_8000)
            assert client.get_vring_base(0) in (0, 0x8000_8000)
        except Closed:
            pass


@pytest.mark.parametrize("value", [2, 0xFFFF_FFFF])
def test_enabled_is_yes_or_no(target: Target, value: int) -> None:
    with mapped(target) as client:
        client.send(Request.SET_VRING_ENABLE, STATE.pack(0, value), flags=VERSION | NEED_REPLY)
        assert verdict(client) in ("accepted", "refused", "closed")


# ---- descriptors that ring -----------------------------------------------------------------------


def file(fds: list[int]) -> int:
    """A regular file."""
    handle, name = tempfile.mkstemp()
    os.unlink(name)  # noqa: PTH108
    return handle


def folder(fds: list[int]) -> int:
    """A directory."""
    return os.open(tempfile.gettempdir(), os.O_RDONLY)


def null(fds: list[int]) -> int:
    """Always ready, and never empty."""
    return os.open(os.devnull, os.O_RDWR)


def zero(fds: list[int]) -> int:
    """Without end."""
    return os.open("/dev/zero", os.O_RDWR)


def opath(fds: list[int]) -> int:
    """A name, no file."""
    return os.open(tempfile.gettempdir(), os.O_PATH)


@pytest.mark.parametrize("make", [file, folder, null, zero, opath])
@pytest.mark.parametrize("enable_first", [False, True])
def test_a_kick_that_cannot_be_waited_for(
    target: Target, make: Callable[[list[int]], int], enable_first: bool, fds: list[int]
) -> None:
    target.memory.write(RAM[0].start, bytes(0x4000))
    fds.append(make(fds))
    kick = fds[-1]

    def start() -> None:
        if enable_first:
            client.set_vring(Request.SET_VRING_ENABLE, 0, 1)
        ring_up(client, fds, kick=kick)
        client.ask_u64(Request.GET_FEATURES)

    with mapped(target) as client:
        fails(target, start)


def hung_up(fds: list[int]) -> int:
    """A pipe nobody can write to."""
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def reset_socket(fds: list[int]) -> int:
    """A connection whose other side has gone with data unread: reading gives ECONNRESET."""
    one, other = socket.socketpair()
    one.send(b"x")
    other.close()
    return one.detach()


def blocking(fds: list[int]) -> int:
    """An eventfd whose reader would wait."""
    return os.eventfd(0)


def endless(fds: list[int]) -> int:
    """Always something to read."""
    return os.open("/dev/urandom", os.O_RDONLY)


def listener(fds: list[int]) -> int:
    """Cannot be read at all."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0qvm-attack-{os.getpid()}-{random.random()}")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(server.getsockname())
    fds.append(client.detach())
    return server.detach()


@pytest.mark.parametrize("make", [hung_up, reset_socket, blocking, endless, listener])
def test_a_kick_that_misbehaves(target: Target, make: Callable[[list[int]], int], fds: list[int]) -> None:
    """Its ring may be lost; the device, and those beside it, are not."""
    target.memory.write(RAM[0].start, bytes(0x4000))
    fds.append(make(fds))
    kick = fds[-1]
    with mapped(target) as client:
        try:
            ring_up(client, fds, kick=kick)
            target.witnessed()
            client.ask_u64(Request.GET_FEATURES)
            client.get_vring_base(0)
        except (Refused, Closed):
            pass


def test_a_kick_without_a_descriptor_means_polling_which_is_refused_or_harmless(target: Target) -> None:
    target.memory.write(RAM[0].start, bytes(0x4000))
    with mapped(target) as client:
        client.set_vring(Request.SET_VRING_NUM, 0, 16)
        client.set_vring_addr(0, START, START + 0x2000, START + 0x1000)
        client.send(Request.SET_VRING_KICK, U64.pack(NO_FD), flags=VERSION | NEED_REPLY)
        verdict(client)


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
@pytest.mark.parametrize("sent", [0, 1, 2])
def test_the_flag_for_no_descriptor_lies(
    target: Target, request_: Request, sent: int, fds: list[int]
) -> None:
    """None where one is announced; one, or two, where none is."""
    fds.append(os.eventfd(0))
    number = 0 if sent != 1 else NO_FD
    with mapped(target) as client:
        rejected(target, client, request_, U64.pack(number), tuple(fds * sent))


def full_event(fds: list[int]) -> int:
    """An eventfd that cannot count further: a writer would wait for ever."""
    fd = os.eventfd(0)
    os.eventfd_write(fd, (1 << 64) - 2)
    return fd


def full_pipe(fds: list[int]) -> int:
    """A pipe without room, whose reader never reads."""
    reader, writer = os.pipe()
    fds.append(reader)
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    return writer


def broken_pipe(fds: list[int]) -> int:
    """A pipe nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def read_only(fds: list[int]) -> int:
    """Cannot be written."""
    return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize(
    "make", [full_event, full_pipe, broken_pipe, read_only, file, folder, null, opath, reset_socket]
)
@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR], ids=["call", "err"])
def test_a_call_or_an_error_that_cannot_be_signalled(
    target: Target, request_: Request, make: Callable[[list[int]], int], fds: list[int]
) -> None:
    """The device works on; nobody waits for the client."""
    fds.append(make(fds))
    driver = target.driver()
    with driver:
        try:
            driver.start()
            driver.client.set_vring_fd(request_, 0, fds[-1])
        except (Refused, Closed):
            return
        ring = driver.queues[0]
        ring.submit([header(IN, 1)], [512, 1])
        ring.offer(0xFFFF)  # no such descriptor: the device needs a reset, which is an error of the ring
        ring.publish()
        driver.notify(0)
        assert driver.client.ask_u64(Request.GET_FEATURES)
        driver.client.get_vring_base(0)
        driver.client.get_vring_base(1)


def test_a_back_end_channel_nobody_reads(target: Target) -> None:
    """Notifications of a configuration change are dropped when there is no room; nobody waits."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with target.driver() as driver, ours, theirs:
        driver.client.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        for _ in range(200):
            driver.start()
            driver.queues[0].offer(0xFFFF)
            driver.queues[0].publish()
            driver.notify(0)
            driver.client.get_vring_base(0)  # the worker has come by
            driver.ram.release(driver.memory.regions[0].start)
        driver.start()
        check_reads(driver)


@pytest.mark.parametrize("make", [file, folder, null, opath, broken_pipe, full_pipe, reset_socket])
def test_a_back_end_channel_that_is_no_socket(
    target: Target, make: Callable[[list[int]], int], fds: list[int]
) -> None:
    """Refused, or of no use."""
    fds.append(make(fds))
    with target.driver() as driver:
        try:
            driver.client.tell(Request.SET_BACKEND_REQ_FD, b"", [fds[-1]])
            driver.start()
            driver.queues[0].offer(0xFFFF)
            driver.queues[0].publish()
            driver.notify(0)
            driver.client.get_vring_base(0)
        except (Refused, Closed):
            pass


# ---- in-flight buffers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "offset", "queues", "queue_size"),
    [
        (0, 0, 2, 128),
        (64, 0, 2, 128),
        (1 << 40, 0, 2, 1024),
        ((1 << 64) - 1, 0, 2, 1024),
        (0x4000, 0x10_0000, 2, 128),
        (0x4000, (1 << 64) - 0x1000, 2, 128),
        (0x4000, 1, 2, 128),
        (0x4000, 0, 0xFFFF, 128),
        (0x4000, 0, 0, 0),
    ],
)
def test_an_in_flight_buffer_that_is_none(
    target: Target, size: int, offset: int, queues: int, queue_size: int, fds: list[int]
) -> None:
    """Refused at once, or when a ring wants to use it."""
    target.memory.write(RAM[0].start, bytes(0x4000))
    fds.append(os.memfd_create("inflight"))
    os.ftruncate(fds[-1], 0x4000)
    described = INFLIGHT.pack(size, offset, queues, queue_size)

    def start() -> None:
        client.tell(Request.SET_INFLIGHT_FD, described, [fds[0]])
        ring_up(client, fds, number=128)
        client.ask_u64(Request.GET_FEATURES)

    with mapped(target) as client:
        if (size, offset) == (0x4000, 1):
            # Unaligned is unusual, not impossible.
            try:
                start()
            except (Refused, Closed):
                pass
            return
        fails(target, start)


@pytest.mark.parametrize("make", [file, folder, null, opath, hung_up, reset_socket])
def test_an_in_flight_descriptor_that_is_no_memory(
    target: Target, make: Callable[[list[int]], int], fds: list[int]
) -> None:
    fds.append(make(fds))
    with mapped(target) as client:
        described = INFLIGHT.pack(0x4000, 0, 2, QUEUE_SIZE)
        fails(target, lambda: client.tell(Request.SET_INFLIGHT_FD, described, [fds[0]]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("features", [1 << 32, 1 << 32 | PACKED], ids=["split", "packed"])
def test_an_in_flight_buffer_full_of_lies(target: Target, features: int, seed: int) -> None:
    """Every number in it is the client's: chains that never were, loops, indices beyond the ring."""
    rng = random.Random(seed)
    driver = target.driver()
    with driver:
        driver.packed = bool(features & PACKED)
        driver.start()
        inflight = driver.inflight
        assert inflight is not None
        size = os.fstat(inflight.fd).st_size
        lies = bytearray(rng.randbytes(size))
        if seed % 2:
            # The head of each part as it should be, so that what follows is believed.
            lies = bytearray(os.pread(inflight.fd, size, 0))
            for _ in range(rng.choice((1, 4, 64, 1024))):
                lies[rng.randrange(size)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        ring_memory = rng.randbytes(0x800)
        os.pwrite(inflight.fd, bytes(lies), 0)
        client = target_again(target, driver)
        if seed % 3 == 0:
            target.memory.write(driver.queues[0].desc, ring_memory)
        try:
            driver.reconnect(client, [0x8000_8000 if driver.packed else 0] * 2)
            driver.notify(0)
            client.ask_u64(Request.GET_FEATURES)
            client.get_vring_base(0)
        except (Refused, Closed):
            pass


def target_again(target: Target, driver: VhostUserDriver) -> Client:
    """The next connection of the same client."""
    driver.client.close()
    return target.client()


# ---- rings themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [129, 0x7FFF, 0xFFFF])
def test_an_available_index_far_ahead(target: Target, jump: int) -> None:
    with target.driver() as driver:
        driver.start()
        driver.queues[0].publish(jump)
        driver.notify(0)
        driver.client.get_vring_base(0)


def test_addresses_of_a_ring_in_two_regions(target: Target, fds: list[int]) -> None:
    """Adjacent in the client's addresses, so that a ring lies half in each: no region holds it."""
    whole = target.region()
    half = whole.size // 2
    regions = [
        Region(whole.guest, half, whole.user, whole.fd),
        Region(whole.guest + (1 << 32), half, whole.user + half, whole.fd, half),
    ]
    fds.append(os.eventfd(0, os.EFD_NONBLOCK))

    def start() -> None:
        client.set_vring(Request.SET_VRING_NUM, 0, 128)
        client.set_vring_addr(0, whole.user + half - 1024, START + 0x2000, START + 0x1000)
        client.set_vring_fd(Request.SET_VRING_KICK, 0, fds[-1])
        client.set_vring(Request.SET_VRING_ENABLE, 0, 1)
        client.ask_u64(Request.GET_FEATURES)

    with mapped(target) as client:
        client.set_mem_table(regions)
        fails(target, start)


def test_addresses_that_only_the_log_would_use(target: Target, fds: list[int]) -> None:
    """The flag to log what is written was not offered."""
    with mapped(target) as client:
        client.set_vring(Request.SET_VRING_NUM, 0, 16)
        row = ADDRESS.pack(0, 1, START, START + 0x2000, START + 0x1000, 0xFFFF_FFFF_FFFF_F000)
        client.send(Request.SET_VRING_ADDR, row, flags=VERSION | NEED_REPLY)
        assert verdict(client) in ("refused", "closed", "accepted")


def test_a_call_that_is_made_blocking_again_when_it_is_full(target: Target) -> None:
    """Its flags are shared, so the client can take back what the server did to be safe."""
    with target.driver() as driver:
        driver.start()
        call = driver._vrings[0].call
        driver.wait(0, 0.5)
        os.set_blocking(call, True)
        os.eventfd_write(call, (1 << 64) - 2)
        driver.queues[0].submit([header(IN, 1)], [512, 1])
        target.witnessed()
        time.sleep(0.1)


def test_a_kick_that_is_made_blocking_again(target: Target) -> None:
    """And is emptied before the server comes to read it."""
    with target.driver() as driver:
        driver.start()
        kick = driver._vrings[0].kick
        os.set_blocking(kick, True)
        for _ in range(2000):
            os.eventfd_write(kick, 1)
            if select.select([kick], [], [], 0)[0]:
                os.set_blocking(kick, False)
                try:
                    os.eventfd_read(kick)
                except BlockingIOError:
                    pass
                os.set_blocking(kick, True)
        target.witnessed()
