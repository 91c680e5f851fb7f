"""What a hostile guest may do to a console: nothing beyond its own device (virtio 1.4, 5.3, 2.7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from multiport import MultiportDriver
from qvm_virtio_console import spec
from qvm_virtio_console.device import VirtioConsole
from qvm_virtio_console.spec import Event

from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.driver import MmioDriver, Piece, VirtioDriver
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


PORTS = [{"name": "log", "hostdev": ">log"}, {"name": "tty", "hostdev": "null", "console": True}]


@pytest.fixture
def multi(console: Console) -> MultiportDriver:
    """A driver that has greeted a device with three ports."""
    multi = MultiportDriver(console(hostdev=">out", ports=PORTS))
    multi.greet()
    return multi


def _errors(multi: MultiportDriver) -> int:
    return multi.device.vdev._control.errors


@pytest.mark.parametrize("event", [*range(8, 12), 0xFFFF])
def test_5_3_6_2_unknown_events(multi: MultiportDriver, tmp_path: Path, event: int) -> None:
    multi.say(event, 1)
    assert (_errors(multi), multi.listen()) == (1, [])
    assert _alive(multi.device, tmp_path / "out")


@pytest.mark.parametrize(
    "event", [Event.DEVICE_ADD, Event.DEVICE_REMOVE, Event.CONSOLE_PORT, Event.RESIZE, Event.PORT_NAME]
)
def test_5_3_6_2_messages_that_only_the_device_sends(multi: MultiportDriver, event: Event) -> None:
    multi.raw(spec.CONTROL.pack(1, event, 1) + b"evil" * 20)
    assert (_errors(multi), multi.listen()) == (1, [])
    assert multi.device.vdev._ports[1].name == "log" and not multi.device.vdev._ports[1].console


@pytest.mark.parametrize("port", [3, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("event", [Event.PORT_READY, Event.PORT_OPEN])
def test_5_3_6_2_ports_at_and_beyond_the_maximum(multi: MultiportDriver, port: int, event: Event) -> None:
    multi.say(event, port)
    assert (_errors(multi), multi.listen()) == (1, [])


@pytest.mark.parametrize("event", [Event.DEVICE_READY, Event.PORT_READY, Event.PORT_OPEN])
def test_5_3_6_2_values_that_are_neither_0_nor_1(multi: MultiportDriver, event: Event) -> None:
    for value in (2, 0x8000, 0xFFFF):
        multi.say(event, 1, value)
    assert (_errors(multi), multi.listen()) == (3, [])
    assert not multi.device.vdev._ports[1].guest_open


@pytest.mark.parametrize("size", [0, 1, 7])
def test_5_3_6_2_control_messages_that_are_too_short(multi: MultiportDriver, size: int) -> None:
    piece = Piece(multi.driver.ram.alloc(8), size or 8)
    ring = multi.driver.queues[spec.CONTROL_TRANSMITQ]
    # Of size 0 there is no descriptor: a buffer of the wrong direction carries no byte either.
    request = ring.add_pieces([piece] if size else [], [] if size else [piece])
    ring.kick()
    multi.device.settle()
    ring.reap()
    assert request.length == 0 and _errors(multi) == 1


def test_5_3_6_2_ready_and_open_before_the_port_was_announced(console: Console) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=PORTS))
    multi.say(Event.PORT_READY, 1)
    multi.say(Event.PORT_OPEN, 1)
    assert (_errors(multi), multi.listen()) == (2, [])
    multi.greet()
    assert (1, Event.PORT_NAME, 1, b"log") in multi.said


def test_5_3_6_2_a_driver_that_failed_is_told_nothing(console: Console) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=PORTS))
    multi.say(Event.DEVICE_READY, value=0)
    assert multi.listen() == []
    multi.greet()
    multi.say(Event.PORT_READY, 1, 0)
    assert not multi.device.vdev._ports[1].ready


def test_5_3_6_2_a_port_the_driver_gave_up_is_not_told_what_was_waiting(console: Console) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=PORTS), buffers=3)
    multi.say(Event.DEVICE_READY)
    multi.say(Event.PORT_READY, 1)
    multi.say(Event.PORT_READY, 1, 0)
    multi.give(10)
    assert multi.listen() == []


def test_a_new_driver_is_not_told_what_the_old_one_did_not_hear(console: Console) -> None:
    device = console(hostdev="null", ports=PORTS)
    MultiportDriver(device, buffers=0).say(Event.DEVICE_READY)
    assert MultiportDriver(device).listen() == []


def test_5_3_6_2_room_too_small_for_a_message(console: Console) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=PORTS), buffers=0)
    multi.give(5, room=7)
    multi.say(Event.DEVICE_READY)
    assert multi.said == [] and _errors(multi) == 5
    multi.give(10)
    assert [event for _, event, _, _ in multi.listen()] == [Event.DEVICE_ADD] * 3, "nothing is lost"
    assert not multi.driver.needs_reset


def test_5_3_6_2_asking_forever_without_listening_stays_bounded(console: Console) -> None:
    multi = MultiportDriver(console(hostdev="null", ports=PORTS), buffers=3)
    multi.say(Event.DEVICE_READY)
    assert len(multi.said) == 3
    mark = multi.driver.ram.mark()
    for _ in range(300):
        for port in range(3):
            multi.say(Event.PORT_READY, port)
        multi.driver.ram.release(mark)
    assert len(multi.device.vdev._control._pending) <= 3 * 4


def test_transmit_and_control_after_reset(multi: MultiportDriver, tmp_path: Path) -> None:
    for queue in (1, 3, 5):
        multi.driver.queues[queue].add([spec.CONTROL.pack(1, Event.PORT_OPEN, 1)], [])
        multi.driver.queues[queue].publish()
    multi.driver.reset()
    for queue in range(8):
        multi.driver.notify(queue)
    multi.device.settle()
    assert (tmp_path / "out").read_bytes() == (tmp_path / "log").read_bytes() == b""
    assert not multi.device.vdev._ports[1].guest_open
    assert _alive(multi.device, tmp_path / "out")


class HostileGuest(VirtioAbuse):
    """Anything at all, over the registers and the rings."""

    def device(self) -> Plugged[Any]:
        return plug(VirtioConsole, hostdev="null")

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        request = driver.queues[TX].submit([b"hello"], [])
        device.settle()
        driver.queues[TX].reap()
        assert request.length == 0


class HostileMultiportGuest(HostileGuest):
    """The same with control queues."""

    def device(self) -> Plugged[Any]:
        return plug(VirtioConsole, hostdev="null", ports=[{"name": "a", "hostdev": "null"}])


TestHostileGuest = HostileGuest.TestCase
TestHostileMultiportGuest = HostileMultiportGuest.TestCase
