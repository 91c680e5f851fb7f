"""A disk on a real NBD server, which dies, hangs, comes back, or never was there."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from nbd_server import Server
from qvm_virtio_blk import libnbd, link, nbd, spec
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.link import locate
from qvm_virtio_blk.testing import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    Guest,
    header,
    segment,
)

from qvmcore.api import HostError
from qvmcore.testing.driver import MmioDriver, Request
from qvmcore.testing.fakes import Plugged, plug

Disk = Callable[..., Plugged[VirtioBlk]]


class RemoteGuest(Guest):
    """A guest whose requests are answered later."""

    def submit(self, readable: Sequence[bytes], writable: Sequence[int]) -> Request:
        request = self.driver.queues[0].submit(readable, writable)
        self.finish([request])
        return request

    def finish(self, requests: Sequence[Request], limit: float = 20.0) -> None:
        """Wait for the answers, or for the device to ask for a reset."""
        deadline = time.monotonic() + limit
        while not all(request.done for request in requests) and not self.driver.needs_reset:
            assert time.monotonic() < deadline, "no answer"
            self.device.settle()
            for queue in self.driver.queues:
                queue.reap()
            time.sleep(0.002)

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + 20
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def status(self, name: str) -> object:
        """One value of the device's status."""
        return self.device.vdev.status()[name]


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def server(request: pytest.FixtureRequest, tmp_path: Path, image: Path) -> Iterator[Server]:
    """A running server of ``image``."""
    try:
        libnbd._library()
    except HostError as error:
        pytest.skip(str(error))
    server = Server(tmp_path, image, request.param).start()
    yield server
    server.kill()


@pytest.fixture
def remote(disk: Disk, server: Server) -> RemoteGuest:
    """A guest with its disk on ``server``."""
    device = disk(hostdev=server.uri, nbd_timeout=60)
    return RemoteGuest(device, MmioDriver.of(device))


def test_every_request(remote: RemoteGuest, image: Path) -> None:
    assert remote.driver.config(0, 8) == 128
    assert remote.driver.features & (spec.F_DISCARD | spec.F_FLUSH)
    assert remote.read(5, 1024) == (OK, b"\5" * 512 + b"\6" * 512)
    assert remote.write(7, b"new!" * 128) == OK
    assert remote.io([header(FLUSH)], [1])[0] == OK
    assert image.read_bytes()[7 * 512 : 8 * 512] == b"new!" * 128
    assert remote.io([header(GET_ID)], [20, 1]) == (OK, b"virtio-blk_test".ljust(20, b"\0"))
    assert remote.ranges(WRITE_ZEROES, segment(8, 4), segment(16, 2, 1)) == OK
    assert remote.read(8, 2048) == (OK, bytes(2048)) and remote.read(16, 1024) == (OK, bytes(1024))
    assert remote.read(12) == (OK, bytes([12]) * 512)
    assert remote.ranges(DISCARD, segment(32, 64)) == OK
    assert remote.io([header(77)], [1])[0] == UNSUPP
    assert remote.read(0, 0) == (OK, b"") and remote.write(0, b"") == OK
    assert remote.alive()
    names = ("reads", "writes", "flushes", "discards", "write_zeroes", "in_flight")
    assert [remote.status(name) for name in names] == [6, 2, 1, 1, 1, 0]


def test_5_2_6_2_discard_reaches_the_image_behind_the_server(disk: Disk, server: Server, image: Path) -> None:
    device = disk(hostdev=server.uri)
    guest = RemoteGuest(device, MmioDriver.of(device))
    assert guest.write(0, b"x" * 65536) == OK and guest.io([header(FLUSH)], [1])[0] == OK
    before = image.stat().st_blocks
    assert guest.ranges(DISCARD, segment(0, 64)) == OK
    assert image.stat().st_blocks < before


def test_5_2_6_bounds_hold_before_the_server_is_asked(remote: RemoteGuest, image: Path) -> None:
    before = image.read_bytes()
    assert remote.read(128)[0] == IOERR and remote.write((1 << 55) - 1, b"x" * 512) == IOERR
    assert remote.ranges(WRITE_ZEROES, segment(127, 2)) == IOERR
    assert remote.alive() and image.read_bytes() == before


def test_a_readable_chain_without_status_needs_a_reset(remote: RemoteGuest) -> None:
    assert not remote.submit([header(IN)], []).done and remote.driver.needs_reset
    remote.driver.start()
    assert remote.alive()


def test_many_requests_at_once_are_all_right(remote: RemoteGuest) -> None:
    queue = remote.driver.queues[0]
    content = {n: bytes([n]) * 512 for n in range(128)}
    dice = random.Random(1)
    for _ in range(10):
        sectors = dice.sample(range(128), 60)
        writes = sectors[:30]
        for n in writes:
            content[n] = dice.randbytes(512)
        requests = [queue.add([header(OUT, n), content[n]], [1]) for n in writes]
        requests += [queue.add([header(IN, n)], [512, 1]) for n in sectors[30:]]
        queue.kick()
        remote.finish(requests)
        assert [r.result() for r in requests] == [b"\0"] * 30 + [content[n] + b"\0" for n in sectors[30:]]


def test_more_than_the_budget_waits_in_the_ring(
    disk: Disk, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "BUDGET", 2048)
    device = disk(hostdev=server.uri, queues=2)
    guest = RemoteGuest(device, MmioDriver.of(device))
    server.signal(signal.SIGSTOP)
    requests = [guest.driver.queues[n % 2].add([header(IN, n)], [1024, 1]) for n in range(40)]
    for queue in guest.driver.queues:
        queue.kick()
    device.settle()
    assert guest.status("in_flight") == 2
    server.signal(signal.SIGCONT)
    guest.finish(requests)
    assert [r.result()[:512] for r in requests] == [bytes([n]) * 512 for n in range(40)]


def test_a_server_that_dies_in_a_request_and_comes_back(remote: RemoteGuest, server: Server) -> None:
    server.signal(signal.SIGSTOP)
    queue = remote.driver.queues[0]
    requests = [queue.add([header(IN, n)], [512, 1]) for n in range(20)]
    requests += [queue.add([header(OUT, 100), b"w" * 512], [1])]
    queue.kick()
    remote.until(lambda: remote.status("in_flight") == 21)
    server.kill()
    remote.until(lambda: remote.status("connected") is False)
    late = queue.submit([header(IN, 50)], [512, 1])
    server.start()
    remote.finish([*requests, late])
    assert [r.result() for r in requests] == [bytes([n]) * 512 + b"\0" for n in range(20)] + [b"\0"]
    assert late.result() == bytes([50]) * 512 + b"\0"
    assert remote.read(100) == (OK, b"w" * 512)
    assert not remote.device.ctx.faults and remote.status("errors") == 0


def test_a_server_that_stays_away_is_ioerr_after_the_time_out(
    disk: Disk, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    device = disk(hostdev=server.uri, nbd_timeout=1)
    guest = RemoteGuest(device, MmioDriver.of(device))
    server.kill()
    with caplog.at_level(logging.WARNING):
        assert guest.read(0)[0] == IOERR
        assert guest.io([header(FLUSH)], [1])[0] == IOERR
    assert "lost the connection" in caplog.text and "within 1 s" in caplog.text
    server.start()
    # A busy machine may need more than the second a request has.
    guest.until(guest.alive)


def test_a_server_that_hangs_is_ioerr_after_the_time_out_and_disconnected(disk: Disk, server: Server) -> None:
    device = disk(hostdev=server.uri, nbd_timeout=1)
    guest = RemoteGuest(device, MmioDriver.of(device))
    server.signal(signal.SIGSTOP)
    assert guest.read(1)[0] == IOERR
    server.signal(signal.SIGCONT)
    guest.until(lambda: guest.read(2) == (OK, b"\2" * 512))
    assert guest.status("connected") is True


def test_2_4_reset_while_the_server_is_silent(remote: RemoteGuest, server: Server) -> None:
    """The old driver's write must not come after the new one's, and nobody waits for the reset."""
    server.signal(signal.SIGSTOP)
    remote.driver.queues[0].submit([header(OUT, 9), b"o" * 512], [1])
    remote.until(lambda: remote.status("in_flight") == 1)
    remote.driver = MmioDriver.of(remote.device)
    remote.driver.start()
    new = remote.driver.queues[0].submit([header(OUT, 9), b"n" * 512], [1])
    remote.device.settle()
    assert remote.status("in_flight") == 1 and not remote.driver.queues[0].reap()
    server.signal(signal.SIGCONT)
    remote.finish([new])
    assert new.result() == b"\0" and remote.read(9) == (OK, b"n" * 512)
    assert not remote.device.ctx.faults


def test_2_4_a_late_answer_leaves_the_memory_of_the_guest_alone(remote: RemoteGuest, server: Server) -> None:
    server.signal(signal.SIGSTOP)
    request = remote.driver.queues[0].submit([header(IN, 9)], [512, 1])
    remote.until(lambda: remote.status("in_flight") == 1)
    remote.driver.reset()
    for piece in request.writable:
        remote.device.memory.write(piece.address, b"\xee" * piece.length)
    server.signal(signal.SIGCONT)
    remote.until(lambda: remote.status("in_flight") == 0)
    assert request.result() == b"\xee" * 513


def test_5_2_5_2_durable_writes_are_followed_by_a_flush(
    remote: RemoteGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = libnbd.Connection._call

    def call(self: libnbd.Connection, name: str, *arguments: object) -> int:
        calls.append(name)
        return real(self, name, *arguments)

    monkeypatch.setattr(libnbd.Connection, "_call", call)
    remote.driver.write_config(32, 1, 0)
    assert remote.write(3, b"d" * 512) == OK
    assert [name for name in calls if name in ("aio_pwrite", "aio_flush")] == ["aio_pwrite", "aio_flush"]


def test_an_error_of_the_server_is_ioerr(disk: Disk, tmp_path: Path, image: Path) -> None:
    trigger = tmp_path / "fail"
    server = Server(tmp_path, image, "nbdkit", ("--filter=error", f"error-file={trigger}", "error=ENOSPC",
                                                "error-rate=100%"))  # fmt: skip
    try:
        device = disk(hostdev=server.start().uri)
        guest = RemoteGuest(device, MmioDriver.of(device))
        trigger.touch()
        assert guest.read(0)[0] == IOERR and guest.write(0, b"x" * 512) == IOERR
        trigger.unlink()
        assert guest.alive() and guest.status("errors") == 2
    finally:
        server.kill()


def test_5_2_6_2_another_size_after_the_reconnection(
    remote: RemoteGuest, server: Server, image: Path
) -> None:
    server.kill()
    image.write_bytes(image.read_bytes() + bytes(512 * 8))
    remote.driver.ack()
    count = remote.device.irq.count
    server.start()
    assert remote.device.irq.wait(count + 1, 20)
    assert remote.driver.config(0, 8) == 136
    assert remote.read(135) == (OK, bytes(512))


def test_another_export_after_the_reconnection_is_refused_and_told_once(
    disk: Disk, tmp_path: Path, image: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "RETRY", 0.01)
    server = Server(tmp_path, image).start()
    try:
        device = disk(hostdev=server.uri)
        guest = RemoteGuest(device, MmioDriver.of(device))
        server.kill()
        other = Server(tmp_path, image, "nbdkit", ("-r",))
        seen: list[int] = []
        real = libnbd.Connection.describe
        monkeypatch.setattr(libnbd.Connection, "describe", lambda self: seen.append(1) or real(self))
        other.start()
        guest.until(lambda: len(seen) > 3)
        other.kill()
        assert caplog.text.count("is read only") == 1
        server.start()
        assert guest.alive()
    finally:
        server.kill()


def test_no_descriptor_and_no_thread_is_left_behind(server: Server) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def run() -> None:
        with plug(VirtioBlk, hostdev=server.uri) as device:
            assert RemoteGuest(device, MmioDriver.of(device)).alive()

    before = held()
    for _ in range(20):
        run()
    assert held() == before


def test_the_end_flushes_once_and_needs_no_server_when_all_is_flushed(
    remote: RemoteGuest, server: Server
) -> None:
    remote.write(0, b"x" * 512)
    remote.io([header(FLUSH)], [1])
    server.kill()
    assert {result.verdict for result in remote.device.terminate()} == {"ok"}


def test_the_end_flushes_what_the_guest_did_not(remote: RemoteGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.write(0, b"x" * 512)
    calls: list[int] = []
    real = libnbd.Connection.flush
    monkeypatch.setattr(libnbd.Connection, "flush", lambda self: calls.append(1) or real(self))
    assert {result.verdict for result in remote.device.terminate()} == {"ok"}
    assert calls == [1]


def test_the_end_without_a_server_says_what_was_lost(remote: RemoteGuest, server: Server) -> None:
    remote.write(0, b"x" * 512)
    server.kill()
    remote.until(lambda: remote.status("connected") is False)
    failed = [result for result in remote.device.terminate() if result.verdict != "ok"]
    assert len(failed) == 1 and "no connection for the last flush" in str(failed[0])


# ---- starting ------------------------------------------------------------------------------------


def test_no_server(disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot connect to nbd\+unix:///") as caught:
        disk(hostdev=f"nbd+unix:///?socket={tmp_path}/none.sock")
    assert "is the server running" in str(caught.value.hint)


def test_no_such_export(disk: Disk, tmp_path: Path, image: Path) -> None:
    server = Server(tmp_path, image, "qemu-nbd", ("-x", "real")).start()
    try:
        with pytest.raises(HostError, match="cannot connect"):
            disk(hostdev=f"nbd+unix:///other?socket={server.socket}")
        disk(hostdev=f"nbd+unix:///real?socket={server.socket}")
    finally:
        server.kill()


def test_a_read_only_server(disk: Disk, tmp_path: Path, image: Path) -> None:
    server = Server(tmp_path, image, "nbdkit", ("-r",)).start()
    try:
        with pytest.raises(HostError, match="is read only"):
            disk(hostdev=server.uri)
        device = disk(hostdev="<" + server.uri)
        guest = RemoteGuest(device, MmioDriver.of(device))
        assert guest.driver.features & spec.F_RO
        assert guest.read(3) == (OK, b"\3" * 512) and guest.write(3, b"x" * 512) == IOERR
    finally:
        server.kill()


def test_a_server_with_large_blocks(disk: Disk, tmp_path: Path, image: Path) -> None:
    words = ("--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=4096",
             "blocksize-maximum=1M")  # fmt: skip
    server = Server(tmp_path, image, "nbdkit", words).start()
    try:
        with pytest.raises(HostError, match="blocks of 4096 bytes"):
            disk(hostdev=server.uri)
        device = disk(hostdev=server.uri, block_size="4K")
        guest = RemoteGuest(device, MmioDriver.of(device))
        assert guest.read(8, 4096)[0] == OK
        assert guest.read(1)[0] == IOERR, "less than a block is the driver's mistake, and harmless"
    finally:
        server.kill()


def test_without_the_library(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libnbd, "_LIBRARY", "libnbd-absent.so.0")
    libnbd._library.cache_clear()
    try:
        with pytest.raises(HostError, match="needs the library libnbd") as caught:
            disk(hostdev="nbd://localhost/")
        assert "apt-get install libnbd0" in str(caught.value.hint)
    finally:
        libnbd._library.cache_clear()


def test_locate_starts_a_relative_socket_at_the_vm_file() -> None:
    base = Path("/vm")
    assert locate("nbd+unix:///a%20b?socket=x/y.sock", base) == "nbd+unix:///a%20b?socket=/vm/x/y.sock"
    assert locate("nbd+unix:///?socket=/s", base) == "nbd+unix:///?socket=/s"
    assert locate("nbd://host:1/x", base) == "nbd://host:1/x"


def test_6_1_in_order_is_offered_for_a_local_disk_only(tmp_path: Path) -> None:
    offered = {}
    for hostdev in ("memory:1M", f"nbd+unix:///?socket={tmp_path / 'absent'}"):
        with plug(VirtioBlk, hostdev=hostdev, delayed="forever") as device:
            offered[hostdev[:3]] = bool(device.vdev.virtio.offered >> 35 & 1)
    assert offered == {"mem": True, "nbd": False}
