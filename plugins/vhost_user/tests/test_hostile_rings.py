"""Rings where none can be, and what is in them."""

from __future__ import annotations

import os

import pytest
from hostile_kit import (
    END,
    PACKED,
    START,
    Target,
    fails,
    mapped,
    ring_up,
    verdict,
)
from qvm_vhost_user.protocol import ADDRESS, NEED_REPLY, STATE, U64, VERSION, Request
from qvm_vhost_user.testing import Closed, Refused, Region

from qvmcore.testing.fakes import RAM

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
