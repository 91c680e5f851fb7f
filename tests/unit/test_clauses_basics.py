"""Clauses of virtio 1.4 that bind every device alike: features, configuration, buffers, reset.

Adding a feature means a look at its clauses: :data:`KNOWN` is what the clause matrix takes for offered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_console.device import VirtioConsole
from qvm_virtio_entropy import VirtioEntropy
from qvm_virtio_net.device import VirtioNet

from qvmcore.memory import GuestMemory
from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.ring import GuestRam, SplitDriver
from qvmcore.testing.samples import Echo
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.split import SplitQueue, SplitRings


class Kind(NamedTuple):
    """A device, the feature bits of its own it may offer, and bit -> the bit it needs."""

    vdev: type[VirtioVdev]
    options: dict[str, object]
    known: set[int]
    requires: dict[int, int]


#: 5.1.3 and 5.1.3.1: what a card offers whatever it is plugged into.
NET = {3, 5, 15, 16, 17, 18, 19, 20, 21, 23}
NET_REQUIRES = {18: 17, 19: 17, 21: 17, 23: 17}

KINDS = {
    "blk": Kind(VirtioBlk, {"hostdev": "memory:1M"}, {2, 6, 9, 10, 11, 13, 14}, {11: 9}),
    "blk_queues": Kind(
        VirtioBlk, {"hostdev": "memory:1M", "queues": 4}, {2, 6, 9, 10, 11, 12, 13, 14}, {11: 9}
    ),
    "blk_read_only": Kind(VirtioBlk, {"hostdev": "memory:1M", "readonly": True}, {2, 5, 6, 10}, {}),
    "console": Kind(VirtioConsole, {"hostdev": "null"}, {0, 2}, {}),
    "console_ports": Kind(
        VirtioConsole, {"hostdev": "null", "ports": [{"name": "a", "hostdev": "null"}]}, {0, 1, 2}, {}
    ),
    "entropy": Kind(VirtioEntropy, {}, set(), {}),
    "net": Kind(VirtioNet, {"none": True}, NET, NET_REQUIRES),
    "net_peer": Kind(
        VirtioNet,
        {"peer": "./lan"},
        NET | {0, 1, 2, 7, 8, 11, 12},
        NET_REQUIRES | {7: 1, 8: 1, 11: 0, 12: 0},
    ),
}

#: Bits of the ring and the transport that qvm implements (6): 24 to 40 belong to nobody else.
KNOWN = {
    spec.VIRTIO_F_INDIRECT_DESC,
    spec.VIRTIO_F_EVENT_IDX,
    spec.VIRTIO_F_VERSION_1,
    spec.VIRTIO_F_RING_PACKED,
    spec.VIRTIO_F_IN_ORDER,
    spec.VIRTIO_F_NOTIFICATION_DATA,
    spec.VIRTIO_F_RING_RESET,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=["mmio", "pci"])
def device(request: pytest.FixtureRequest, kind: Kind, tmp_path: Path) -> Iterator[Plugged[Any]]:
    with plug(kind.vdev, kind.options, base_dir=tmp_path, transport=request.param) as device:
        yield device
        device.settle()
        assert device.ctx.faults == []


# ---- features, 2.2.2 and 6.2 -------------------------------------------------------------------------


def test_2_2_2_only_known_features_are_offered(device: Plugged[Any], kind: Kind) -> None:
    bits = {bit for bit in range(128) if device.driver().offered() >> bit & 1}
    assert bits <= kind.known | KNOWN
    assert spec.VIRTIO_F_VERSION_1 in bits


def test_2_2_2_no_feature_is_offered_without_those_it_requires(device: Plugged[Any], kind: Kind) -> None:
    offered = device.driver().offered()
    assert [bit for bit, needs in kind.requires.items() if offered >> bit & 1 > offered >> needs & 1] == []
    assert all(offered >> bit & 1 for bit in kind.requires), "or this test shows nothing"


# ---- configuration, 2.5.2 ------------------------------------------------------------------------------


def test_2_5_2_every_field_reads_the_same_before_features_ok(device: Plugged[Any]) -> None:
    driver = device.driver()
    length = len(device.vdev.config_space())

    def fields() -> bytes:
        return bytes(driver.config(offset, 1) for offset in range(length))

    before = fields()
    assert before == device.vdev.config_space()
    driver.negotiate()
    assert fields() == before


# ---- buffers, 2.7.5.1 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_2_7_5_1_readable_buffers_and_descriptors_stay_as_they_were(
    device: Plugged[Any], indirect: bool
) -> None:
    driver = device.driver()
    driver.start(driver.offered() & ~(1 << spec.VIRTIO_F_RING_PACKED))
    finished = 0
    for ring in driver.queues:
        assert isinstance(ring, SplitDriver)
        ring.indirect = indirect
        # A write of one sector to a disk, output to a console, and room for whatever answers.
        requests = [
            ring.add([struct.pack("<IIQ", 1, 0, 0), b"\xa5" * 512], [64]),
            ring.add([], [64]),
        ]
        before = _untouchable(ring, requests)
        ring.kick()
        device.settle()
        assert _untouchable(ring, requests) == before
        finished += len(ring.reap())
    assert finished, "the device did nothing at all"


def _untouchable(ring: SplitDriver, requests: list[Any]) -> list[bytes]:
    """The descriptor table, the indirect tables and the readable buffers."""
    table = ring.memory.read(ring.desc, spec.VIRTQ_DESC_SIZE * ring.size)
    found = [bytes(table)]
    for request in requests:
        address, length, flags, _ = struct.unpack_from("<QIHH", table, spec.VIRTQ_DESC_SIZE * request.head)
        if flags & spec.VIRTQ_DESC_F_INDIRECT:
            found.append(ring.memory.read(address, length))
        found += [ring.memory.read(piece.address, piece.length) for piece in request.readable]
    return found


# ---- the used ring, 2.7.8.2 ------------------------------------------------------------------------------


def test_2_7_8_2_data_and_length_are_there_before_the_index() -> None:
    memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 16)])
    driver = SplitDriver(GuestRam(memory), 8)
    rings = SplitRings(memory, 8, driver.desc, driver.avail, driver.used)
    queue = SplitQueue(0, rings, memory, 0, lambda: None, lambda error: None, lambda: None)
    seen: list[tuple[int, bytes, bytes]] = []

    class Watched:
        """The used ring; looks at guest memory in the moment before its index is stored."""

        def __init__(self, used: Any) -> None:
            self.used = used

        def __getitem__(self, place: int) -> int:
            return int(self.used[place])

        def __setitem__(self, place: int, value: int) -> None:
            if place == 1:
                seen.append((value, memory.read(driver.used + 4, 8), request.result()))
            self.used[place] = value

    queue._used = Watched(queue._used)  # type: ignore[assignment]
    request = driver.submit([b"ask"], [3, 5])
    chain = queue.pop()
    assert chain is not None
    chain.write(b"answer")
    queue.push(chain)
    assert seen == [(1, struct.pack("<II", request.head, 6), b"answer\0\0")]
    assert driver.reap() == [request]


# ---- reset over MMIO, 4.2.2.1 ----------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[Plugged[Echo]]:
    with plug(Echo, transport="mmio") as device:
        yield device


def _of_each_queue(driver: MmioDriver, register: int) -> list[int]:
    values = []
    for index in range(2):
        driver.write(spec.MMIO_QUEUE_SEL, index)
        values.append(driver.read(register))
    return values


def test_4_2_2_1_reset_clears_interrupt_status_and_every_queue_ready(echo: Plugged[Echo]) -> None:
    driver = MmioDriver.of(echo)
    driver.start()
    driver.queues[0].submit([b"x"], [4])
    echo.settle()
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()
    assert driver.interrupt_status() == 3
    assert _of_each_queue(driver, spec.MMIO_QUEUE_READY) == [1, 1]
    driver.status = 0
    assert driver.interrupt_status() == 0
    assert _of_each_queue(driver, spec.MMIO_QUEUE_READY) == [0, 0]


def test_4_2_2_1_queue_reset_reads_0_after_a_device_reset(echo: Plugged[Echo]) -> None:
    driver = MmioDriver.of(echo)
    driver.start()
    setup = echo.vdev.virtio.setup(0)
    assert setup is not None
    setup.resetting = True  # as while the worker is waited for
    assert _of_each_queue(driver, spec.MMIO_QUEUE_RESET) == [1, 0]
    driver.status = 0
    assert driver.status == 0
    assert _of_each_queue(driver, spec.MMIO_QUEUE_RESET) == [0, 0]
