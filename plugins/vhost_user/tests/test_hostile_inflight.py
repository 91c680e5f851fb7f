"""Buffers of in-flight requests that are none, or are full of lies."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hostile_kit import (
    PACKED,
    QUEUE_SIZE,
    Target,
    fails,
    mapped,
    ring_up,
)
from odd_files import file, folder, hung_up, null, opath, reset_socket
from qvm_vhost_user.protocol import INFLIGHT, Request
from qvm_vhost_user.testing import Client, Closed, Refused
from qvm_vhost_user.testing_driver import VhostUserDriver

from qvmcore.testing.fakes import RAM


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
