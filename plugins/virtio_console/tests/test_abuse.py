"""What a hostile guest may do to a console: nothing beyond its own device (virtio 1.4, 5.3, 2.7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_console.device import VirtioConsole

from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.driver import MmioDriver, Piece
from qvmcore.testing.fakes import Plugged, plug

Console = Callable[..., Plugged[VirtioConsole]]
RX, TX = 0, 1


def _alive(device: Plugged[VirtioConsole], output: Path) -> bool:
    """Whether a fresh driver can print."""
    driver = MmioDriver.of(device)
    driver.start()
    before = output.stat().st_size
    request = driver.queues[TX].submit([b"alive"], [])
    device.settle()
    driver.queues[TX].reap()
    return request.done and output.stat().st_size == before + 5 and not device.ctx.faults


@pytest.fixture
def device(console: Console) -> Plugged[VirtioConsole]:
    """A console that prints into ``out``."""
    return console(hostdev=">out")


@pytest.fixture
def driver(device: Plugged[VirtioConsole]) -> MmioDriver:
    """A started driver."""
    driver = MmioDriver.of(device)
    driver.start()
    return driver


def test_5_3_6_wrong_direction_transfers_nothing(
    device: Plugged[VirtioConsole], driver: MmioDriver, tmp_path: Path
) -> None:
    request = driver.queues[TX].submit([], [64])
    device.settle()
    driver.queues[TX].reap()
    assert request.length == 0 and request.result() == bytes(64)
    assert (tmp_path / "out").read_bytes() == b""
    assert _alive(device, tmp_path / "out")


def test_5_3_6_a_receive_buffer_that_cannot_be_written(console: Console, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"input")
    device = console(hostdev="<in")
    driver = MmioDriver.of(device)
    driver.start()
    useless = driver.queues[RX].submit([b"readable"], [])
    good = driver.queues[RX].submit([], [16])
    device.settle()
    driver.queues[RX].reap()
    assert useless.length == 0
    assert good.length == 5 and good.result()[:5] == b"input"


def test_2_7_zero_length_descriptors(
    device: Plugged[VirtioConsole], driver: MmioDriver, tmp_path: Path
) -> None:
    ram = driver.ram
    request = driver.queues[TX].add_pieces([Piece(ram.alloc(1), 0), Piece(ram.put(b"x"), 1), Piece(0, 0)], [])
    driver.queues[TX].kick()
    device.settle()
    driver.queues[TX].reap()
    assert request.length == 0 or driver.needs_reset
    assert _alive(device, tmp_path / "out")


@pytest.mark.parametrize(
    ("address", "length"),
    [(0x8000_0000, 0xFFFF_FFFF), ((1 << 64) - 16, 32), (0, 16), (0x1C0D_0000, 64), (0x8040_0000 - 8, 16)],
)
@pytest.mark.parametrize("queue", [RX, TX])
def test_2_7_5_buffers_that_are_not_memory(
    device: Plugged[VirtioConsole], driver: MmioDriver, tmp_path: Path, queue: int, address: int, length: int
) -> None:
    piece = [Piece(address, length)]
    driver.queues[queue].add_pieces(piece if queue == TX else [], piece if queue == RX else [])
    driver.queues[queue].kick()
    device.settle()
    assert not device.ctx.faults
    assert (tmp_path / "out").read_bytes() == b""
    driver.reset()
    assert _alive(device, tmp_path / "out")


def test_5_3_2_the_control_queue_of_multiport_does_not_exist(
    device: Plugged[VirtioConsole], driver: MmioDriver, tmp_path: Path
) -> None:
    assert [driver.queue_size_max(index) for index in range(5)] == [128, 128, 0, 0, 0]
    for queue in (2, 3, 4, 0xFFFF, 0xFFFF_FFFF):
        driver.notify(queue)
    assert not driver.offered() & 2
    assert _alive(device, tmp_path / "out")


def test_5_3_4_writes_all_over_the_configuration(
    device: Plugged[VirtioConsole], driver: MmioDriver, tmp_path: Path
) -> None:
    before = [driver.config(at, 4) for at in (0, 4, 8, 12)]
    for offset in (*range(8), *range(9, 20), 0xF0):
        for size in (1, 2, 4):
            if offset % size == 0:
                driver.write_config(offset, size, 0x41414141 & ((1 << 8 * size) - 1))
    assert [driver.config(at, 4) for at in (0, 4, 8, 12)] == before
    assert (tmp_path / "out").read_bytes() == b""
    assert _alive(device, tmp_path / "out")


def test_kick_after_reset_prints_nothing(
    device: Plugged[VirtioConsole], driver: MmioDriver, tmp_path: Path
) -> None:
    driver.queues[TX].add([b"late"], [])
    driver.queues[TX].publish()
    driver.reset()
    driver.notify(TX)
    device.settle()
    assert (tmp_path / "out").read_bytes() == b""
    assert _alive(device, tmp_path / "out")


class HostileGuest(VirtioAbuse):
    """Anything at all, over the registers and the rings."""

    def device(self) -> Plugged[Any]:
        return plug(VirtioConsole, hostdev="null")

    def check_works(self, device: Plugged[Any], driver: MmioDriver) -> None:
        request = driver.queues[TX].submit([b"hello"], [])
        device.settle()
        driver.queues[TX].reap()
        assert request.length == 0


TestHostileGuest = HostileGuest.TestCase
