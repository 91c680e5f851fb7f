"""Rings in a session with a real vdev: what a guest or a client gets wrong, and memory that moves."""

from __future__ import annotations

import os
import threading

import pytest
from qvm_vhost_user.protocol import ADDRESS, NO_FD, REGION, SINGLE, STATE, U64, Request
from qvm_vhost_user.testing import Closed, Refused, Region
from qvm_vhost_user.testing_driver import USER, VhostUserDriver
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IN, OK, header
from qvm_virtio_entropy import VirtioEntropy
from session_kit import (
    LIMIT,
    PROTOCOLS,
    WITHOUT_INFLIGHT,
    ServedVdev,
    content,
    finish,
    read,
)

from qvmcore.api import ClientError, GuestMemory, MemorySpec
from qvmcore.testing.ring import Piece, RingDriver
from qvmcore.virtio import spec

VERSION_1 = 1 << spec.VIRTIO_F_VERSION_1
OWN = 1 << 30

pytestmark = pytest.mark.usefixtures("nothing_left_open")


# ---- what a guest, or its client, gets wrong ---------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_VRING_NUM, STATE.pack(0, 3)),
        (Request.SET_VRING_NUM, STATE.pack(0, 2048)),
        (Request.SET_VRING_ADDR, ADDRESS.pack(0, 0, 0, 0, 0, 0)),
        (
            Request.SET_VRING_ADDR,
            ADDRESS.pack(0, 0, USER + 0x8000_0008, USER + 0x8000_2000, USER + 0x8000_1000, 0),
        ),
        (
            Request.SET_VRING_ADDR,
            ADDRESS.pack(0, 0, USER + 0x803F_FFF0, USER + 0x8000_2000, USER + 0x8000_1000, 0),
        ),
        (Request.SET_VRING_ADDR, ADDRESS.pack(0, 0, 2**64 - 16, USER + 0x8000_2000, USER + 0x8000_1000, 0)),
        (Request.SET_VRING_BASE, STATE.pack(0, 0x1_0000)),
        (Request.SET_VRING_BASE, STATE.pack(0, 500)),
    ],
)
def test_a_ring_that_cannot_be_is_refused_and_signalled_and_the_next_one_runs(
    rng: ServedVdev[VirtioEntropy], request_: Request, payload: bytes
) -> None:
    with rng.driver(WITHOUT_INFLIGHT) as driver:
        base = driver.stop_queue(0)
        client, vring = driver.client, driver._vrings[0]
        client.set_vring_fd(Request.SET_VRING_KICK, 0, vring.kick)  # starts, so stop it for good:
        assert client.get_vring_base(0) == base
        with pytest.raises(Refused):
            client.tell(request_, payload)
            client.set_vring_fd(Request.SET_VRING_KICK, 0, vring.kick)
        assert driver.failed(0, LIMIT)
        os.eventfd_read(vring.err)
        driver._start_vring(0, base)
        driver.queues[0].submit([], [16])
        finish(driver)
    assert rng.ctx.faults == []


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "message"),
    [
        (Request.SET_VRING_NUM, STATE.pack(1, 8), 0, "ring 1 does not exist; the device has 1"),
        (Request.SET_VRING_BASE, STATE.pack(2**32 - 1, 8), 0, "ring 4294967295 does not exist"),
        (Request.GET_VRING_BASE, STATE.pack(1, 0), 0, "ring 1 does not exist"),
        (Request.SET_VRING_ENABLE, STATE.pack(1, 1), 0, "ring 1 does not exist"),
        (
            Request.SET_VRING_ENABLE,
            STATE.pack(0, 2),
            0,
            "SET_VRING_ENABLE says 2 for ring 0, expected 0 or 1",
        ),
        (Request.SET_VRING_ADDR, ADDRESS.pack(1, 0, 0, 0, 0, 0), 0, "ring 1 does not exist"),
        (Request.SET_VRING_ADDR, ADDRESS.pack(0, 1, 0, 0, 0, 0), 0, "SET_VRING_ADDR has flags 0x1"),
        (Request.SET_VRING_KICK, U64.pack(1), 1, "ring 1 does not exist"),
        (Request.SET_VRING_CALL, U64.pack(255), 1, "ring 255 does not exist"),
        (Request.SET_VRING_ERR, U64.pack(1 | NO_FD), 0, "ring 1 does not exist"),
        (Request.SET_VRING_KICK, U64.pack(NO_FD), 0, "ring 0 shall be polled"),
        (Request.SET_VRING_KICK, U64.pack(0), 0, "announces one and came with 0 descriptors"),
        (Request.SET_VRING_CALL, U64.pack(NO_FD), 1, "announces none and came with 1 descriptors"),
        (Request.SET_VRING_CALL, U64.pack(1 << 9), 1, "has the number 0x200"),
    ],
)
def test_a_message_about_a_ring_that_makes_no_sense(
    rng: ServedVdev[VirtioEntropy], request_: Request, payload: bytes, fds: int, message: str
) -> None:
    event = os.eventfd(0)
    try:
        with pytest.raises(ClientError, match=message), rng.driver() as driver, pytest.raises(Closed):
            driver.client.send(request_, payload, [event] * fds)
            driver.client.receive()
    finally:
        os.close(event)
    assert rng.ctx.faults == []


def test_a_broken_ring_is_signalled_and_the_next_driver_mends_it(rng: ServedVdev[VirtioEntropy]) -> None:
    """SET_FEATURES with the same features, when nothing else tells of the reset."""
    with rng.driver(PROTOCOLS["UML's"]) as driver:
        ring = driver.queues[0]
        ring.offer(0xFFFF)
        ring.publish()
        driver.notify(0)
        assert driver.failed(0, LIMIT)
        assert rng.vdev.virtio.status & spec.DEVICE_NEEDS_RESET
        for _ in range(2):
            driver.reset()
            driver.start()
            driver.queues[0].submit([], [16])
            finish(driver)
    assert rng.ctx.faults == []


def test_rings_before_SET_FEATURES_or_SET_MEM_TABLE_are_refused(
    rng: ServedVdev[VirtioEntropy], caplog: pytest.LogCaptureFixture
) -> None:
    with rng.connect() as client:
        client.negotiate()
        event = os.eventfd(0)
        client.set_vring(Request.SET_VRING_NUM, 0, 8)
        client.set_vring_addr(0, 0, 0, 0)
        client.set_vring_fd(Request.SET_VRING_KICK, 0, event)
        os.close(event)
        with pytest.raises(Refused):
            client.set_vring(Request.SET_VRING_ENABLE, 0, 1)
        client.tell(Request.SET_FEATURES, U64.pack(VERSION_1 | OWN))
        assert rng.vdev.virtio.features == VERSION_1, "these are in force all the same"
        assert client.get_vring_base(0) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "SET_VRING_ENABLE refused: queue 0: client address 0x0 is in no region of the memory table",
        "SET_FEATURES refused: queue 0: client address 0x0 is in no region of the memory table",
    ]


def test_refusals_without_end_do_not_fill_the_log(
    rng: ServedVdev[VirtioEntropy], caplog: pytest.LogCaptureFixture
) -> None:
    with rng.driver() as driver:
        for _ in range(100):
            with pytest.raises(Refused):
                driver.client.set_vring(Request.SET_VRING_NUM, 0, 8)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 21
    assert lines[0] == "SET_VRING_NUM refused: ring 0 runs, its size cannot change; GET_VRING_BASE stops it"
    assert lines[-1] == "further refusals to this client are not logged"


# ---- memory that moves -------------------------------------------------------------------------------


def test_memory_comes_goes_and_moves_while_a_ring_works(disk: ServedVdev[VirtioBlk], packed: bool) -> None:
    """ADD_MEM_REG, REM_MEM_REG and SET_MEM_TABLE under load; no request is lost or wrong."""
    with disk.driver(packed=packed) as driver:
        ring, done, failed = driver.queues[0], threading.Event(), []
        pieces = [
            (Piece(driver.ram.put(header(IN, sector)), 16), Piece(driver.ram.alloc(513), 513))
            for sector in range(16)
        ]

        def load() -> None:
            try:
                while not done.is_set():
                    work(ring, driver, pieces)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        extra = GuestMemory.allocate([MemorySpec(0x1_0000_0000, 1 << 20)])
        whole, more = driver.regions()[0], extra.regions[0]
        region = Region(more.start, more.size, more.start + USER, more.fd)
        try:
            for number in range(20):
                driver.client.tell(Request.ADD_MEM_REG, bytes(8) + region.pack(), [region.fd])
                assert len(disk.memory.regions) == 2
                if number % 2:
                    driver.client.set_mem_table([whole])
                else:
                    fds = [region.fd] if number % 4 else []
                    driver.client.tell(Request.REM_MEM_REG, bytes(8) + region.pack(), fds)
                assert len(disk.memory.regions) == 1
        finally:
            done.set()
            thread.join(2 * LIMIT)
            extra.close()
        assert failed == []
        assert not thread.is_alive()
        assert not disk.vdev.virtio.status & spec.DEVICE_NEEDS_RESET
        work(ring, driver, pieces)


def work(ring: RingDriver, driver: VhostUserDriver, pieces: list[tuple[Piece, Piece]]) -> None:
    """Read all sectors of ``pieces`` at once, and check them."""
    requests = [ring.add_pieces([head], [room]) for head, room in pieces]
    ring.kick()
    finish(driver)
    for sector, request in enumerate(requests):
        assert request.result() == content(sector) + bytes([OK])


def test_REM_MEM_REG_of_memory_with_a_ring_in_it_waits_for_ADD_MEM_REG(
    rng: ServedVdev[VirtioEntropy], packed: bool
) -> None:
    """QEMU takes regions away to add them again in other pieces."""
    with rng.driver(packed=packed) as driver:
        whole = driver.regions()[0]
        half = whole.size // 2
        one = whole._replace(size=half)
        other = Region(whole.guest + half, half, whole.user + half, whole.fd, half)
        for before, after in (([whole], [one, other]), ([one, other], [whole])) * 3:
            for region in before:
                driver.client.tell(Request.REM_MEM_REG, SINGLE.pack(0, *REGION.unpack(region.pack())))
            assert rng.memory.regions == ()
            driver.queues[0].submit([], [16])
            rng.ctx.settle(LIMIT)
            for region in after:
                payload = SINGLE.pack(0, *REGION.unpack(region.pack()))
                driver.client.tell(Request.ADD_MEM_REG, payload, [region.fd])
            finish(driver)
    assert rng.ctx.faults == []


def test_SET_MEM_TABLE_without_what_a_ring_is_in_breaks_the_device_until_it_is_reset(
    rng: ServedVdev[VirtioEntropy],
) -> None:
    with rng.driver() as driver:
        driver.client.set_mem_table([])
        assert driver.failed(0, LIMIT)
        assert rng.memory.regions == ()
        driver.reset()
        driver.start()
        driver.queues[0].submit([], [16])
        finish(driver)
    assert rng.ctx.faults == []


# ---- the end -----------------------------------------------------------------------------------------


def test_a_client_that_leaves_at_work_leaves_nothing_behind(disk: ServedVdev[VirtioBlk]) -> None:
    for _ in range(3):
        with disk.driver() as driver:
            for sector in range(50):
                driver.queues[0].submit([header(IN, sector)], [512, 1])
        assert disk.vdev.virtio.queue(0) is None
        assert len(disk.memory.regions) == 1, "mapped until the core unmaps it"
        for region in disk.memory.regions:
            region.close()
        disk.memory.replace(())
        disk.reset()


def test_no_interrupt_is_sent_after_the_session(rng: ServedVdev[VirtioEntropy]) -> None:
    with rng.driver() as driver:
        call = os.dup(driver._vrings[0].call)
    os.set_blocking(call, False)
    try:
        os.eventfd_read(call)
    except BlockingIOError:
        pass
    rng.session.interrupt_queue(0)
    rng.session.interrupt_config()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(call)
    os.close(call)


def test_several_devices_of_one_process_do_not_meet(
    rng: ServedVdev[VirtioEntropy], disk: ServedVdev[VirtioBlk]
) -> None:
    with disk.driver() as driver:
        with pytest.raises(ClientError, match="ring 9"), rng.driver() as other, pytest.raises(Closed):
            other.client.get_vring_base(9)
        assert read(driver, 7) == content(7)
