"""A server that is killed with requests in hand: the next one serves them, each once, for the same guest.

The guest writes blocks that say which write they are. It has at most one write of a block on the way, so in
the end each block must hold the last one: a write that was lost, or done again after a later one, shows
there; a chain that is given back twice, or never, shows in the ring.
"""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qvm_vhost_user.testing import Client, Closed
from qvm_vhost_user.testing_driver import VhostUserDriver, ready, ring_position
from qvm_virtio_blk.testing import OK, OUT, header

from qvmcore.api import GuestMemory
from qvmcore.testing.fakes import RAM
from qvmcore.testing.ring import Piece, RingDriver
from tests.foreign.qemu_serve import Serve

KILLS = int(os.environ.get("QVM_KILLS", "4"))
#: Seconds in which something has to happen.
LIMIT = 10.0
BLOCK, BLOCKS, QUEUES, QUEUE_SIZE, DEPTH = 4096, 48, 2, 64, 16
SECTORS = BLOCK // 512
DISKS = {
    "virtio-blk": f'type = "virtio-blk"\nqueues = {QUEUES}\n',
    "any-order": 'type = "shuffled-disk"\n',
}
VERSION_1, EVENT_IDX, PACKED = 1 << 32, 1 << 29, 1 << 34
#: Several queues; and without FLUSH every write would wait for the medium.
BLK_MQ, BLK_FLUSH = 1 << 12, 1 << 9


class Writer:
    """The guest: writes without end, and keeps account."""

    def __init__(self, driver: VhostUserDriver, rng: random.Random) -> None:
        self.driver = driver
        self.rng = rng
        self.sequence = 0
        self.written = [0] * BLOCKS
        self.flying: list[dict[int, tuple[int, int, tuple[Piece, Piece, Piece]]]] = [
            {} for _ in range(QUEUES)
        ]
        self.submitted = [0] * QUEUES
        self.returned = [0] * QUEUES
        ram = driver.ram
        self.buffers = [
            (Piece(ram.alloc(16), 16), Piece(ram.alloc(BLOCK), BLOCK), Piece(ram.alloc(1), 1))
            for _ in range(QUEUES * DEPTH)
        ]
        self.tables = ram.mark()

    def fill(self) -> None:
        """As many new writes as there is room for."""
        busy = {block for flying in self.flying for block, _, _ in flying.values()}
        for index, ring in enumerate(self.driver.queues):
            while len(self.flying[index]) < DEPTH and ring.free >= 3 and self.buffers:
                block = self.rng.choice([each for each in range(BLOCKS) if each not in busy])
                busy.add(block)
                self.submit(index, ring, block)
            ring.kick()

    def submit(self, index: int, ring: RingDriver, block: int) -> None:
        """One write."""
        self.sequence += 1
        pieces = self.buffers.pop()
        memory = self.driver.memory
        memory.write(pieces[0].address, header(OUT, block * SECTORS))
        memory.write(pieces[1].address, content(self.sequence))
        memory.write(pieces[2].address, b"\xff")
        request = ring.add_pieces(pieces[:2], pieces[2:])
        assert request.head not in self.flying[index]
        self.flying[index][request.head] = (block, self.sequence, pieces)
        self.submitted[index] += 1

    def reap(self) -> None:
        """What came back was in flight (reap() checks that), came once, and was done."""
        for index, ring in enumerate(self.driver.queues):
            # Looked at again after the next interrupt was asked for: what came in between has none.
            while done := ring.reap():
                for request in done:
                    block, sequence, pieces = self.flying[index].pop(request.head)
                    assert request.result() == bytes([OK]), f"write {sequence} failed"
                    assert request.length == 1
                    self.written[block] = sequence
                    self.buffers.append(pieces)
                    self.returned[index] += 1

    def wait(self) -> None:
        """For interrupts, or for the server to go; one of them comes when requests are in flight."""
        driver = self.driver
        calls = [vring.call for vring in driver._vrings]
        connection = driver.client.socket.fileno()
        readable = ready([*calls, connection], LIMIT)
        assert readable, f"no interrupt came; in flight are {[sorted(each) for each in self.flying]}"
        for call in calls:
            if call in readable:
                os.eventfd_read(call)
        if connection in readable and not driver.client.socket.recv(1):
            raise Closed("the server is gone")

    def work(self, until: float) -> None:
        """Write until then; Closed when the server goes first."""
        while time.monotonic() < until:
            self.fill()
            self.wait()
            self.reap()

    def finish(self) -> None:
        """Wait for what is in flight."""
        self.reap()
        while any(self.flying):
            self.wait()
            self.reap()


def content(sequence: int) -> bytes:
    """A block that says which write it is, in every sector."""
    return struct.pack("<Q", sequence) * (BLOCK // 8)


@pytest.fixture(params=DISKS)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Serve]:
    """Of a disk of ours, or of one that makes the most of giving back in any order."""
    installed = tmp_path / "shuffled_disk-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: shuffled-disk\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[qvm.vdev.v1]\nshuffled-disk = shuffled_disk\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(tmp_path)]))
    (tmp_path / "disk.img").write_bytes(bytes(BLOCK * BLOCKS))
    vm = f'[[vdev]]\nname = "disk"\nhostdev = "disk.img"\n{DISKS[request.param]}'
    serve = Serve(tmp_path, vm, "vhost-user")
    yield serve
    serve.close()


@pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event_idx"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_no_write_is_lost_and_none_is_given_back_twice(
    server: Serve, tmp_path: Path, packed: bool, features: int
) -> None:
    """QVM_KILLS says how often the server is killed."""
    memory = GuestMemory.allocate(RAM)
    rng = random.Random(packed * 2 + bool(features))
    with VhostUserDriver(Client.connect(server.socket("disk")), memory, [QUEUE_SIZE] * QUEUES) as driver:
        driver.packed = packed
        driver.start(VERSION_1 | BLK_MQ | BLK_FLUSH | features | (PACKED if packed else 0))
        guest = Writer(driver, rng)
        held = 0
        for _ in range(KILLS):
            timer = threading.Timer(rng.uniform(0.0, 0.15), server.process.kill)
            timer.start()
            with pytest.raises(Closed):
                guest.work(time.monotonic() + 30)
            timer.join()
            server.kill()
            guest.reap()  # what it gave back in its last moments counts
            held += sum(map(len, guest.flying))
            server.start()
            client = Client.connect(server.socket("disk"))
            driver.reconnect(client, [ring_position(ring) for ring in driver.queues])
        guest.work(time.monotonic() + 0.1)
        guest.finish()
        assert guest.returned == guest.submitted
        for ring, count in zip(driver.queues, guest.submitted, strict=True):
            assert ring.used_idx == count & 0xFFFF
            assert ring.in_flight == 0
        assert held, "no server was killed with anything in hand: nothing was shown"
        assert guest.sequence > KILLS * 2 * DEPTH, "hardly anything was written"
    assert server.stop() == 0
    image = (tmp_path / "disk.img").read_bytes()
    for block, sequence in enumerate(guest.written):
        expected = content(sequence) if sequence else bytes(BLOCK)
        assert image[block * BLOCK : (block + 1) * BLOCK] == expected, (
            f"block {block} is not write {sequence}"
        )
    memory.close()
    print(f"{guest.sequence} writes, {KILLS} kills, {held} in hand at a kill")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_without_the_buffer_a_restart_goes_on_with_what_comes_next(server: Serve, packed: bool) -> None:
    """Nothing in hand, so nothing is lost even so."""
    memory = GuestMemory.allocate(RAM)
    with VhostUserDriver(
        Client.connect(server.socket("disk")), memory, [QUEUE_SIZE] * QUEUES, protocol=~(1 << 12)
    ) as driver:
        driver.packed = packed
        driver.start()
        assert driver.inflight is None
        guest = Writer(driver, random.Random(3))
        for _ in range(3):
            for _ in range(5):
                guest.fill()
                guest.finish()
                driver.ram.release(guest.tables)
            server.kill()
            server.start()
            client = Client.connect(server.socket("disk"))
            driver.reconnect(client, [ring_position(ring) for ring in driver.queues])
        guest.fill()
        guest.finish()
        assert guest.returned == guest.submitted
    memory.close()
