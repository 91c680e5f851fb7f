"""Kick, call and error descriptors that cannot ring, and a back-end channel that is none."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import pytest
from hostile_kit import (
    START,
    Target,
    check_reads,
    fails,
    mapped,
    rejected,
    ring_up,
    verdict,
)
from odd_files import (
    blocking,
    broken_pipe,
    endless,
    file,
    folder,
    full_event,
    full_pipe,
    hung_up,
    listener,
    null,
    opath,
    reset_socket,
    unwritable,
    zero,
)
from qvm_vhost_user.protocol import NEED_REPLY, NO_FD, U64, VERSION, Request
from qvm_vhost_user.testing import Closed, Refused
from qvm_vhost_user.testing_driver import ready
from qvm_virtio_blk.testing import IN, header

from qvmcore.testing.fakes import RAM


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


@pytest.mark.parametrize(
    "make", [full_event, full_pipe, broken_pipe, unwritable, file, folder, null, opath, reset_socket]
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
            if ready([kick]):
                os.set_blocking(kick, False)
                try:
                    os.eventfd_read(kick)
                except BlockingIOError:
                    pass
                os.set_blocking(kick, True)
        target.witnessed()
