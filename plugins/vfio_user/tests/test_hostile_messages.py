"""A client that sends what it must not: an error or the door, a line in the log, and nobody else notices."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import count
from typing import Any

import pytest
from hostile import BROKEN, FILE_SIZE, NO_VERSION, WRONG, Bad, access, opened
from qvm_vfio_user.testing import (
    CONFIG_REGION,
    HEADER,
    INFO,
    INTX,
    MSIX,
    NO_REPLY,
    Client,
    Command,
    Gone,
    Irq,
    Refused,
)
from vfio_serving import DEVICES, Guest, Serving

from qvmcore.testing.ring import Piece

pytest.importorskip("qvm_hello", reason="the example vdev is not installed")
pytest.importorskip("qvm_virtio_entropy", reason="virtio-entropy is not installed")

TARGET = "rng0"
VIRTIO = 0x1AF4


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all of these tests: what one does to it, the next one would see."""
    with Serving(tmp_path_factory.mktemp("hostile"), DEVICES) as process:
        yield process
        assert process.stop() == 0


@pytest.fixture
def serving(process: Serving) -> Iterator[Serving]:
    """Afterwards nothing is left of any client, and a good one finds every device at work."""
    yield process
    process.settle()
    process.check_alive()
    process.check_entropy()


def fate(client: Client, bad: Bad, log: Callable[[], str]) -> str:
    """Send it: "refused", or "dropped" with a line in the log. Anything else fails."""
    try:
        with opened(bad.fds) as fds:
            client.send(bad.bytes(), fds)
        reply = client.receive()
        assert reply.refused and reply.id == 7, f"{reply} answers {bad}"
        assert client.read(CONFIG_REGION, 0, 2) == VIRTIO
    except Gone:
        # The line comes before the descriptor is closed; "said once" is for those that stay.
        assert f"{TARGET}: connection closed: " in log(), log()
        return "dropped"
    return "refused"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_message_is_refused_or_ends_the_connection(serving: Serving, name: str) -> None:
    since = len(serving.log)
    with serving.client(TARGET) as client:
        client.version()
        fate(client, WRONG[name], lambda: serving.logged(since))
    assert TARGET in serving.logged(since)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_message_that_wants_no_reply_gets_none(serving: Serving, name: str) -> None:
    bad = WRONG[name]
    with serving.client(TARGET) as client:
        client.version()
        try:
            with opened(bad.fds) as fds:
                client.send(bad._replace(flags=bad.flags | NO_REPLY).bytes(), fds)
            # The next answer is that of the next question.
            assert client.info()[:2] == (3, 9)
        except Gone:
            pass


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_message_ends_the_connection_with_a_line(serving: Serving, name: str) -> None:
    since = len(serving.log)
    with serving.client(TARGET) as client:
        client.version()
        with pytest.raises(Gone):
            client.send(BROKEN[name])
            while client.receive().refused:
                pass  # an error may say goodbye
    (line,) = [line for line in serving.logged(since).splitlines() if "connection closed" in line]
    assert f"{TARGET}: connection closed: " in line and len(line) < 300
    assert " -" not in line, "a negative number says nothing to people"


@pytest.mark.parametrize("name", NO_VERSION)
def test_a_conversation_begins_with_a_version(serving: Serving, name: str) -> None:
    since, bad = len(serving.log), NO_VERSION[name]
    with serving.client(TARGET) as client, opened(bad.fds) as fds, pytest.raises(Gone):
        client.send(bad.bytes(), fds)
        while client.receive().refused:
            pass
    assert f"{TARGET}: connection closed: " in serving.logged(since)
    assert len(serving.logged(since)) < 1000


# ---- cut short -----------------------------------------------------------------------------------------

#: What QEMU sends until its guest starts, shortened.
CONVERSATION: tuple[Callable[[Client], Any], ...] = (
    lambda client: client.version(),
    lambda client: client.dma_map(0x8000_0000, FILE_SIZE, client.fds[0]),  # type: ignore[attr-defined]
    lambda client: client.info(),
    lambda client: client.region(0),
    lambda client: client.irq(MSIX),
    lambda client: client.read(CONFIG_REGION, 0, 4),
    lambda client: client.write(CONFIG_REGION, 4, 2, 6),
    lambda client: client.set_irqs(Irq.EVENTFD | Irq.TRIGGER, INTX, fds=[client.fds[1]]),  # type: ignore[attr-defined]
    lambda client: client.set_irqs(Irq.EVENTFD | Irq.TRIGGER, MSIX, 0, 2, fds=[client.fds[1]] * 2),  # type: ignore[attr-defined]
    lambda client: client.write(0, 0x14, 1, 1),
    lambda client: client.write_multi([(0, 0x14, 1, 3), (0, 0x14, 1, 0)]),
    lambda client: client.reset(),
    lambda client: client.dma_unmap(0x8000_0000, FILE_SIZE),
)


@pytest.mark.parametrize("steps", range(len(CONVERSATION) + 1))
@pytest.mark.parametrize("deaf", [False, True], ids=["polite", "deaf"])
def test_it_may_leave_after_any_message(serving: Serving, steps: int, deaf: bool) -> None:
    """A deaf client leaves with an answer unread, so that the server sees a reset connection."""
    with serving.client(TARGET) as client, opened(("memfd", "eventfd")) as fds:
        client.fds = fds  # type: ignore[attr-defined]
        for step in CONVERSATION[:steps]:
            step(client)
        if deaf and steps:
            for _ in range(20):
                client.post(Command.GET_INFO, INFO.pack(16, 0, 0, 0))


class Recorder(Client):
    """Keeps what it would send, for :func:`recorded`."""

    def __init__(self) -> None:
        super().__init__(socket.socket(socket.AF_UNIX))
        self.sent: list[tuple[bytes, int]] = []

    def send(self, data: bytes, fds: Any = ()) -> None:
        self.sent.append((data, len(fds)))
        raise Gone


def recorded() -> list[tuple[bytes, int]]:
    """The conversation as bytes, each with its number of descriptors."""
    with Recorder() as client:
        client.fds = [0, 0]  # type: ignore[attr-defined]
        for step in CONVERSATION:
            with pytest.raises(Gone):
                step(client)
        return client.sent


@pytest.mark.parametrize("step", range(len(CONVERSATION)))
def test_it_may_leave_inside_any_message(serving: Serving, step: int) -> None:
    """After 1 byte, in and behind the header, a byte before the end; with the descriptors already there."""
    data, files = recorded()[step]
    since = len(serving.log)
    cuts = sorted({1, 8, 15, 16, 17, len(data) - 1} & set(range(1, len(data))))
    for cut in cuts:
        with serving.client(TARGET) as client, opened(("memfd", "eventfd")) as fds:
            client.fds = fds  # type: ignore[attr-defined]
            if step:
                client.version()
            client.send(data[:cut], fds[:1] * files)
    lines = "in the middle of a message"
    serving.wait(lambda: serving.logged(since).count(lines) == len(cuts), "a line is missing")


def test_a_message_may_come_byte_by_byte(serving: Serving) -> None:
    with serving.client(TARGET) as client:
        for byte in Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"{}\0").bytes():
            client.send(bytes([byte]))
        assert client.receive().id == 7
        for byte in Bad(Command.REGION_READ, access(0, CONFIG_REGION, 2)).bytes():
            client.send(bytes([byte]))
        assert client.receive().payload[16:] == VIRTIO.to_bytes(2, "little")


def test_many_messages_may_come_at_once(serving: Serving) -> None:
    with serving.client(TARGET) as client:
        client.version()
        one = Bad(Command.REGION_READ, access(0, CONFIG_REGION, 2)).bytes()
        client.send(one * 500)
        for _ in range(500):
            assert client.receive().payload[16:] == VIRTIO.to_bytes(2, "little")


def test_files_with_every_byte_of_a_message_are_too_many(serving: Serving) -> None:
    since = len(serving.log)
    with serving.client(TARGET) as client, opened(("memfd",) * 16) as fds, pytest.raises(Gone):
        client.version()
        for byte in Bad(Command.SET_IRQS, bytes(1000)).bytes():
            client.send(bytes([byte]), fds)
        client.receive()
    assert "descriptors" in serving.logged(since)


# ---- clients that do not listen ------------------------------------------------------------------------


def test_a_client_that_never_reads_its_answers_harms_nobody_else(serving: Serving) -> None:
    """The server waits for it, as a bus would; but for nobody else, and not when it leaves."""
    with serving.client(TARGET) as client:
        client.version()
        client.socket.settimeout(0.5)
        one = Bad(Command.REGION_READ, access(0, CONFIG_REGION, 0x100)).bytes()
        with pytest.raises(TimeoutError):
            for _ in range(10_000):
                client.send(one * 100)
        serving.check_alive()


def test_a_client_that_says_nothing_harms_nobody_else(serving: Serving) -> None:
    with serving.client(TARGET), serving.client("disk0") as half:
        half.send(b"\1")
        serving.check_alive()


def test_300_clients_at_one_socket(serving: Serving) -> None:
    """One is served, the others are turned away or find the door shut; none of them waits for ever."""
    with Guest(serving, TARGET) as guest, ExitStack() as stack:
        crowd = [stack.enter_context(serving.client(TARGET)) for _ in range(300)]
        for client in crowd:
            with pytest.raises((Gone, ConnectionError)):
                client.version()
        assert guest.device.read(0, 2) == VIRTIO


def test_the_end_does_not_wait_for_a_client_that_does_not_listen(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Serving(tmp_path_factory.mktemp("deaf"), DEVICES) as serving:
        with serving.client(TARGET) as deaf, serving.client("hello0"), serving.client("disk0") as half:
            deaf.version()
            deaf.socket.settimeout(0.5)
            one = Bad(Command.REGION_READ, access(0, CONFIG_REGION, 0x100)).bytes()
            with pytest.raises(TimeoutError):
                for _ in range(10_000):
                    deaf.send(one * 100)
            half.send(HEADER.pack(1, Command.VERSION, 100, 0, 0))
            assert serving.stop() == 0
        assert "Traceback" not in serving.log and "does not end" not in serving.log


# ---- interrupts that nobody takes ----------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "later"])
def test_an_eventfd_that_blocks_and_is_full_stops_no_device(serving: Serving, when: str) -> None:
    """The client shares its file with the server, so it may make it block after it was looked at."""
    with Guest(serving, "hello0", posted=False) as guest:
        assert guest.remote is not None
        flags = os.EFD_CLOEXEC | (os.EFD_NONBLOCK if when == "later" else 0)
        fd = os.eventfd((1 << 32) - 1, flags)
        try:
            os.eventfd_write(fd, (1 << 64) - 1 - (1 << 32))
            guest.client.set_irqs(Irq.EVENTFD | Irq.TRIGGER, INTX, fds=[fd])
            os.set_blocking(fd, True)
            for value in range(3):
                guest.remote.write(guest.base + 4, 4, value)
                guest.client.set_irqs(Irq.NONE | Irq.UNMASK, INTX)
                assert guest.remote.read(guest.base + 4, 4) == value
        finally:
            os.close(fd)


# ---- memory --------------------------------------------------------------------------------------------


def test_maps_that_overlap_are_refused_and_the_first_stays(serving: Serving) -> None:
    with serving.client(TARGET) as client, opened(("memfd",)) as (fd,):
        client.version()
        client.dma_map(0x1_0000, 0x8000, fd)
        for start, size in (
            (0x1_0000, 0x8000),
            (0xF000, 0x1001),
            (0x1_7FFF, 1),
            (0, 0x2_0000),
            (0x1_4000, 1),
        ):
            for file in (fd, None):
                with pytest.raises(Refused) as refused:
                    client.dma_map(start, size, file)
                assert refused.value.errno == 17
        for start, size in ((0xF000, 0x1000), (0x1_8000, 0x1000)):
            client.dma_map(start, size, fd)
        client.dma_unmap(0x1_0000, 0x8000)
        client.dma_map(0x1_4000, 0x1000, fd)


def test_half_of_a_map_cannot_be_unmapped(serving: Serving) -> None:
    with serving.client(TARGET) as client, opened(("memfd",)) as (fd,):
        client.version()
        client.dma_map(0x1_0000, 0x8000, fd)
        for start, size in ((0x1_0000, 0x4000), (0x1_4000, 0x4000), (0x1_7000, 0x2000), (0xF000, 0x2000)):
            with pytest.raises(Refused):
                client.dma_unmap(start, size)
        client.dma_unmap(0x1_0000, 0x8000)
        with pytest.raises(Refused):
            client.dma_unmap(0x1_0000, 0x8000)


def test_as_many_maps_as_one_may_have_leave_room_for_other_clients(serving: Serving) -> None:
    """On every device at once; each map keeps a descriptor in the server."""
    with opened(("memfd",)) as (fd,):
        clients = [serving.client(name) for name in ("rng0", "disk0", "console0", "net0")]
        try:
            for client in clients:
                client.version()
                number = 0
                with pytest.raises(Refused):
                    for number in range(100_000):
                        client.dma_map(number << 16, 0x1000, fd)
                assert 64 <= number < 70_000
            serving.check_alive()
            for client in clients:
                assert client.info()[:2] == (3, 9)
        finally:
            for client in clients:
                client.close()


def test_maps_of_enormous_files_leave_room_for_other_clients(serving: Serving) -> None:
    """Files without pages cost nothing but addresses, of which the server has 128 TiB."""
    fd = os.memfd_create("huge", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 1 << 46)
        with serving.client("net0") as client:
            client.version()
            addresses = count(0, 1 << 47)
            for shift in range(46, 15, -1):
                with suppress(Refused):
                    for address in addresses:
                        client.dma_map(address, 1 << shift, fd)
            serving.check_alive()
            with Guest(serving, TARGET) as guest:
                driver = guest.driver()
                driver.start()
                request = driver.queues[0].submit([], [16])
                assert guest.reap(driver.queues[0]) == [request]
    finally:
        os.close(fd)


def test_a_rom_is_not_written(serving: Serving) -> None:
    """A guest may point a device at its firmware: the device needs a reset, that is all."""
    with Guest(serving, TARGET, posted=False) as guest, opened(("memfd",)) as (fd,):
        os.pwrite(fd, b"firmware" * 512, 0)
        guest.client.dma_map(0xF_0000, 0x1000, fd, flags=1)
        driver = guest.driver()
        driver.start()
        driver.queues[0].add_pieces([], [Piece(0xF_0000, 64)])
        driver.queues[0].publish()
        driver.queues[0].notify()
        serving.wait(lambda: driver.needs_reset, "the device does not notice")
        assert os.pread(fd, 4096, 0) == b"firmware" * 512
        driver.start()
        request = driver.queues[0].submit([], [16])
        assert guest.reap(driver.queues[0]) == [request]
    assert "isolated" not in serving.log


def test_rings_in_memory_that_cannot_be_written(serving: Serving) -> None:
    """What the device writes ends nowhere, as on a bus."""
    with Guest(serving, TARGET, posted=False) as guest:
        region = guest.memory.regions[0]
        guest.client.dma_unmap(region.start, region.size)
        guest.client.dma_map(region.start, region.size, region.fd, flags=1)
        driver = guest.driver()
        driver.start()
        driver.queues[0].submit([], [16])
        before = bytes(region.view)
        time.sleep(0.1)
        guest.client.info()
        assert region.view == before
    assert "isolated" not in serving.log


# ---- very many -----------------------------------------------------------------------------------------


def test_10000_bad_connections_leave_nothing(serving: Serving) -> None:
    """Of every kind in turn, as fast as the server takes them; a bystander works all the while."""
    since = len(serving.log)
    wrong, first, broken = [*WRONG.values()], [*NO_VERSION.values()], [*BROKEN.values()]
    with Guest(serving, "disk0") as bystander:
        for number in range(10_000):
            with serving.client(TARGET if number % 10 == 0 else "hello0") as client, suppress(Gone):
                if number % 4 == 0:
                    client.send(broken[number // 4 % len(broken)])
                elif number % 4 == 1:
                    _send(client, first[number // 4 % len(first)])
                else:
                    client.version()
                    _send(client, wrong[number // 4 % len(wrong)], whole=number % 4 == 2)
                if number % 4 != 3:
                    client.receive()
            if number % 1000 == 0:
                assert bystander.device.read(0, 2) == VIRTIO
        # The last few may still be on their way.
        assert serving.logged(since).count("client connected") > 9_900


def _send(client: Client, bad: Bad, whole: bool = True) -> None:
    with opened(bad.fds) as fds:
        data = bad.bytes()
        client.send(data if whole else data[: len(data) // 2], fds)
