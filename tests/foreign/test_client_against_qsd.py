"""The vhost-user client of the test kit against a server that is not ours: qemu-storage-daemon.

What the client says of our servers is worth as much as this shows of the client: it reads, writes and
understands the answers of a server it did not grow up with.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from qvm_vhost_user.protocol import ProtocolFeature, Request
from qvm_vhost_user.testing import Client, Closed, Refused, Region
from qvm_vhost_user.testing_driver import USER, VhostUserDriver
from qvm_virtio_blk.testing import GET_ID, IN, OK, OUT, header

from qvmcore.memory import GuestMemory
from qvmcore.testing.driver import PackedDriver
from qvmcore.testing.fakes import RAM
from qvmcore.testing.ring import Request as Chain
from qvmcore.types import MemorySpec

QSD = "qemu-storage-daemon"
SECTORS = 2048
QUEUE_SIZE = 128

pytestmark = pytest.mark.skipif(shutil.which(QSD) is None, reason=f"no {QSD} on this machine")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk; sector n is filled with the low byte of n."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([n & 0xFF]) * 512 for n in range(SECTORS)))
    return path


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[Path]:
    """The socket of a daemon with this disk and two queues."""
    path = tmp_path / "qsd.sock"
    export = f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={path},writable=on,num-queues=2"
    command = [QSD, "--blockdev", f"driver=file,node-name=f,filename={image}", "--export", export]
    with subprocess.Popen(command) as daemon:
        try:
            yield path
        finally:
            daemon.terminate()


@pytest.fixture
def driver(server: Path) -> Iterator[VhostUserDriver]:
    """A driver that has not begun."""
    memory = GuestMemory.allocate(RAM)
    with VhostUserDriver(Client.connect(server), memory, [QUEUE_SIZE] * 4) as driver:
        yield driver
    memory.close()


def complete(driver: VhostUserDriver, index: int, count: int) -> list[Chain]:
    """Wait for that many requests of a queue."""
    done: list[Chain] = []
    while len(done) < count:
        done += driver.queues[index].reap()
        assert len(done) == count or driver.wait(index), f"{len(done)} of {count} requests came back"
    return done


def test_it_negotiates_what_both_have(driver: VhostUserDriver) -> None:
    for feature in (
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.CONFIG,
        ProtocolFeature.BACKEND_REQ,
    ):
        assert driver.client.has(feature)
    assert not driver.client.has(ProtocolFeature.STATUS)
    driver.start()
    assert driver.status & 8 and not driver.needs_reset
    assert len(driver.queues) == 2  # GET_QUEUE_NUM, not the four asked for


def test_it_reads_the_configuration(driver: VhostUserDriver) -> None:
    assert driver.config(0, 8) == SECTORS
    assert driver.config(20, 4) == 512  # blk_size
    assert driver.config(34, 2) == 2  # num_queues


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_it_reads_and_writes_on_both_queues(
    driver: VhostUserDriver, image: Path, event_idx: bool, indirect: bool
) -> None:
    driver.start(driver.acceptable() & ~(1 << 28 | 1 << 29) | indirect << 28 | event_idx << 29)
    for index, ring in enumerate(driver.queues):
        ring.indirect = indirect
        rng = random.Random(index)
        data = rng.randbytes(4096)
        sector = 64 * (index + 1)
        for _ in range(3):
            request = ring.submit([header(OUT, sector), data], [1])
            assert complete(driver, index, 1) == [request] and request.result() == bytes([OK])
            request = ring.submit([header(IN, sector)], [4096, 1])
            assert complete(driver, index, 1) == [request] and request.result() == data + bytes([OK])
        with image.open("rb") as disk:
            assert os.pread(disk.fileno(), 4096, sector * 512) == data


def test_many_requests_at_once_wrap_the_ring_and_none_is_lost(driver: VhostUserDriver) -> None:
    driver.start()
    ring, rng = driver.queues[0], random.Random(7)
    for _ in range(20):
        mark = driver.ram.mark()
        wanted = {}
        for _ in range(40):
            sector = rng.randrange(SECTORS)
            wanted[ring.add([header(IN, sector)], [512, 1]).head] = sector
        ring.kick()
        for request in complete(driver, 0, 40):
            assert request.result() == bytes([wanted.pop(request.head) & 0xFF]) * 512 + bytes([OK])
        assert wanted == {}
        driver.ram.release(mark)


def test_get_id(driver: VhostUserDriver) -> None:
    driver.start()
    request = driver.queues[0].submit([header(GET_ID)], [20, 1])
    complete(driver, 0, 1)
    assert request.result()[-1] == OK


def test_a_ring_is_stopped_and_started_where_it_was(driver: VhostUserDriver) -> None:
    driver.start()
    for position in range(1, 4):
        driver.queues[0].submit([header(IN, 1)], [512, 1])
        complete(driver, 0, 1)
        assert driver.stop_queue(0) == position
        driver._start_vring(0, position)
    driver.queues[0].submit([header(IN, 2)], [512, 1])
    complete(driver, 0, 1)


def test_it_starts_again_after_a_reset(driver: VhostUserDriver) -> None:
    for _ in range(3):
        driver.start()
        request = driver.queues[0].submit([header(IN, 5)], [512, 1])
        complete(driver, 0, 1)
        assert request.result() == bytes([5]) * 512 + bytes([OK])


def test_the_next_client_is_served_where_the_first_left(server: Path, driver: VhostUserDriver) -> None:
    """With its rings in the middle of things, as after a reconnect."""
    driver.start()
    for sector in (1, 2):
        request = driver.queues[0].submit([header(IN, sector)], [512, 1])
        complete(driver, 0, 1)
    driver.client.close()
    driver.reconnect(Client.connect(server), [driver.queues[0].used_position, 0])
    request = driver.queues[0].submit([header(IN, 3)], [512, 1])
    complete(driver, 0, 1)
    assert request.result()[:1] == b"\3"


def test_memory_in_slots(driver: VhostUserDriver) -> None:
    client = driver.client
    assert client.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    assert client.ask_u64(Request.GET_MAX_MEM_SLOTS) >= 8
    driver.start(1 << 32)
    memory = GuestMemory.allocate([MemorySpec(0x1_0000_0000, 1 << 20)])
    more = memory.regions[0]
    region = Region(more.start, more.size, more.start + USER, more.fd)
    client.add_mem_reg(region)
    request = driver.queues[0].submit([header(IN, 9)], [512, 1])
    complete(driver, 0, 1)
    assert request.result()[:1] == b"\t"
    client.rem_mem_reg(region)
    memory.close()


def test_packed_rings_are_not_offered_so_the_client_does_not_take_them(driver: VhostUserDriver) -> None:
    driver.packed = True
    driver.start()
    assert not any(isinstance(ring, PackedDriver) for ring in driver.queues)


def test_the_end_of_a_connection_is_seen(driver: VhostUserDriver) -> None:
    """The daemon acknowledges a region that it could not map, and closes."""
    with open(os.devnull, "rb") as file:
        try:
            driver.client.add_mem_reg(Region(0, 4096, USER, file.fileno()))
        except (Refused, Closed):
            pass
        assert driver.client.closed()


def test_a_refusal_is_told_from_an_acknowledgement(driver: VhostUserDriver) -> None:
    """Of a ring the device does not have."""
    with pytest.raises((Refused, Closed)):
        driver.client.set_vring(Request.SET_VRING_ENABLE, 99, 1)
        driver.client.ask_u64(Request.GET_FEATURES)
