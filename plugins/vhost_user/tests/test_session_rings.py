"""Rings in a session with a real vdev: start, stop, pause, moving memory, and who may do what when."""

from __future__ import annotations

import os

import pytest
from qvm_vhost_user.protocol import NO_FD, U64, Request
from qvm_vhost_user.testing import ALL_FEATURES, Refused
from qvm_vhost_user.testing_driver import USER, VhostUserDriver
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IN, OK, OUT, header
from qvm_virtio_entropy import VirtioEntropy
from session_kit import (
    LIMIT,
    PROTOCOLS,
    RAM,
    WITHOUT_INFLIGHT,
    ServedVdev,
    content,
    finish,
    read,
    stands_still,
)

from qvmcore.api import GuestMemory
from qvmcore.virtio import spec

VERSION_1 = 1 << spec.VIRTIO_F_VERSION_1
OWN = 1 << 30
WCE = 32

pytestmark = pytest.mark.usefixtures("nothing_left_open")


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_requests_are_served_with_whatever_a_client_knows(
    disk: ServedVdev[VirtioBlk], packed: bool, protocol: int
) -> None:
    with disk.driver(protocol, packed=packed) as driver:
        mark = driver.ram.mark()
        for sector in range(300):
            assert read(driver, sector) == content(sector)
            driver.ram.release(mark)
        data = os.urandom(1024)
        request = driver.queues[0].submit([header(OUT, 5), data], [1])
        finish(driver)
        assert request.result() == bytes([OK])
        assert read(driver, 5) + read(driver, 6) == data


# ---- start and stop ----------------------------------------------------------------------------------


def test_SET_VRING_ENABLE_1_starts_and_0_stops_until_it_is_1_again(
    rng: ServedVdev[VirtioEntropy], packed: bool
) -> None:
    with rng.driver(packed=packed) as driver:
        ring, client = driver.queues[0], driver.client
        for _ in range(5):
            ring.submit([], [16])
            finish(driver)
            client.set_vring(Request.SET_VRING_ENABLE, 0, 0)
            ring.submit([], [16])
            stands_still(rng, driver)
            client.set_vring(Request.SET_VRING_ENABLE, 0, 1)
            finish(driver)


@pytest.mark.parametrize(
    "missing",
    [Request.SET_VRING_NUM, Request.SET_VRING_ADDR, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE],
)
def test_a_ring_starts_with_the_last_of_what_it_needs(
    rng: ServedVdev[VirtioEntropy], missing: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Request, bytes, list[int]]] = []
    memory = GuestMemory.allocate(RAM)
    with rng.connect() as client, VhostUserDriver(client, memory, rng.vdev.queue_sizes) as driver:
        tell = client.tell

        def hold(request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
            if request == missing:
                held.append((Request(request), payload, list(fds)))
            else:
                tell(request, payload, fds)

        monkeypatch.setattr(driver.client, "tell", hold)
        driver.start()
        ring = driver.queues[0]
        ring.submit([], [16])
        driver.notify(0)
        stands_still(rng, driver)
        for message in held:
            tell(*message)
        if missing is Request.SET_VRING_NUM:
            # A number alone changes nothing: a ring is looked at when what says where it is comes.
            driver.client.set_vring(Request.SET_VRING_ENABLE, 0, 1)
        finish(driver)
    memory.close()


def test_GET_VRING_BASE_says_where_it_stands_and_then_nothing_touches_the_ring(
    rng: ServedVdev[VirtioEntropy], packed: bool
) -> None:
    with rng.driver(packed=packed) as driver:
        ring = driver.queues[0]
        for _ in range(70):
            ring.submit([], [16])
            finish(driver)
        base = driver.client.get_vring_base(0)
        # 70 of 64 places: the second round, of which the wrap counters are 0.
        assert base == (0x0006_0006 if packed else 70)
        driver.wait(0, 0.0)
        ring.submit([], [16])
        os.eventfd_write(driver._vrings[0].kick, 1)
        stands_still(rng, driver)
        assert not driver.wait(0, 0.0)
        assert driver.client.get_vring_base(0) == base, "asked again it says the same"
        driver._start_vring(0, base)
        finish(driver)


def test_a_paused_guest_finds_its_device_as_it_was(disk: ServedVdev[VirtioBlk], packed: bool) -> None:
    """QEMU: GET_VRING_BASE for each ring; then SET_FEATURES as before, memory and SET_VRING_BASE."""
    with disk.driver(PROTOCOLS["UML's"], packed=packed) as driver:
        driver.client.set_config(WCE, b"\0")
        for sector in range(200):
            assert read(driver, sector) == content(sector)
            if sector % 20 == 0:
                base = driver.client.get_vring_base(0)
                driver.client.tell(Request.SET_FEATURES, U64.pack(driver.features | OWN))
                driver._send_memory()
                driver._start_vring(0, base)
                assert driver.client.get_config(WCE, 1) == b"\0"
        assert disk.vdev.virtio.features == driver.features


@pytest.mark.parametrize("protocol", [WITHOUT_INFLIGHT, ALL_FEATURES], ids=["", "INFLIGHT_SHMFD"])
def test_requests_in_flight_when_a_guest_is_paused_are_answered_before_or_after(
    disk: ServedVdev[VirtioBlk], packed: bool, protocol: int
) -> None:
    with disk.driver(protocol, packed=packed) as driver:
        ring, mark = driver.queues[0], driver.ram.mark()
        for pause in range(30):
            requests = [ring.submit([header(IN, sector)], [512, 1]) for sector in range(32)]
            base = driver.client.get_vring_base(0)
            before = len(ring.reap())
            driver._start_vring(0, base)
            finish(driver)
            assert [request.result() for request in requests] == [
                content(sector) + bytes([OK]) for sector in range(32)
            ], f"pause {pause}, {before} answered before"
            driver.ram.release(mark)


def test_SET_FEATURES_with_others_is_another_driver(disk: ServedVdev[VirtioBlk], packed: bool) -> None:
    with disk.driver(PROTOCOLS["UML's"], packed=packed) as driver:
        driver.client.set_config(WCE, b"\0")
        assert read(driver, 1) == content(1)
        driver.client.tell(Request.SET_FEATURES, U64.pack(VERSION_1 | OWN))
        assert driver.client.get_config(WCE, 1) == b"\1"
        # Until there is another kick descriptor.
        driver.queues[0].submit([header(IN, 1)], [512, 1])
        driver.notify(0)
        stands_still(disk, driver)
        driver._vrings[0].started = False
        driver.start()
        assert read(driver, 2) == content(2)


def test_SET_STATUS_0_before_GET_VRING_BASE_still_says_where_it_stood(
    disk: ServedVdev[VirtioBlk], packed: bool
) -> None:
    """QEMU up to 8.0 pauses a guest in this order."""
    with disk.driver(packed=packed) as driver:
        for sector in range(10):
            assert read(driver, sector) == content(sector)
        driver.client.tell(Request.SET_STATUS, U64.pack(0))
        base = driver.client.get_vring_base(0)
        assert base & 0x7FFF == 10 if not packed else base & 0x7FFF > 0
        driver.client.tell(Request.SET_FEATURES, U64.pack(driver.features | OWN))
        driver._start_vring(0, base)
        for sector in range(10, 20):
            assert read(driver, sector) == content(sector)


def test_descriptors_of_a_running_ring_can_be_replaced(rng: ServedVdev[VirtioEntropy], packed: bool) -> None:
    with rng.driver(packed=packed) as driver:
        vring, ring = driver._vrings[0], driver.queues[0]
        for _ in range(20):
            for request, old in ((Request.SET_VRING_KICK, vring.kick), (Request.SET_VRING_CALL, vring.call)):
                new = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                driver.client.set_vring_fd(request, 0, new)
                os.dup2(new, old)
                os.close(new)
                ring.submit([], [16])
                finish(driver)


def test_SET_VRING_CALL_without_a_descriptor_is_for_a_client_that_looks_itself(
    rng: ServedVdev[VirtioEntropy],
) -> None:
    with rng.driver() as driver:
        driver.client.tell(Request.SET_VRING_CALL, U64.pack(NO_FD))
        driver.wait(0, 0.0)
        request = driver.queues[0].submit([], [16])
        rng.ctx.settle(LIMIT)
        while driver.queues[0].reap() != [request]:
            assert not driver.wait(0, 0.01)


def test_SET_VRING_ADDR_while_it_runs_moves_it(rng: ServedVdev[VirtioEntropy]) -> None:
    with rng.driver() as driver:
        ring, memory = driver.queues[0], driver.memory
        ring.submit([], [16])
        finish(driver)
        desc = driver.ram.put(memory.read(ring.desc, 16 * ring.size))
        ring.desc = desc
        driver.client.set_vring_addr(0, desc + USER, ring.used + USER, ring.avail + USER)
        ring.submit([], [16])
        finish(driver)


@pytest.mark.parametrize(
    "request_", [Request.SET_VRING_NUM, Request.SET_VRING_BASE], ids=lambda each: each.name
)
def test_size_and_position_of_a_running_ring_are_refused(
    rng: ServedVdev[VirtioEntropy], request_: Request
) -> None:
    with rng.driver() as driver:
        with pytest.raises(Refused):
            driver.client.set_vring(request_, 0, 32)
        driver.queues[0].submit([], [16])
        finish(driver)
