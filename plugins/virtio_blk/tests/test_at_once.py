"""Requests served on the vCPU that notified, and those that are left to the worker."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from qvm_virtio_blk.backend import FileBackend
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, Guest, Start, header, segment

from qvmcore.api import Virtqueue
from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests the worker found, each time it was called for some."""
    found: list[int] = []
    real = VirtioBlk.handle_queue

    def handle_queue(self: VirtioBlk, index: int, queue: Virtqueue) -> None:
        if queue.pending:
            found.append(queue.pending)
        real(self, index, queue)

    monkeypatch.setattr(VirtioBlk, "handle_queue", handle_queue)
    return found


@pytest.fixture
def nowait(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The error number of reads and writes that must not wait, by name; 0 is none, whatever the host."""
    errors = {"preadv": 0, "pwritev": 0}
    for name in errors:
        monkeypatch.setattr(os, name, _transfer(getattr(os, name), name, errors))
    return errors


def _transfer(real: Any, name: str, errors: dict[str, int]) -> Callable[..., int]:
    def transfer(fd: int, views: Any, at: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and errors[name]:
            raise OSError(errors[name], os.strerror(errors[name]))
        return int(real(fd, views, at, flags & ~os.RWF_NOWAIT))

    return transfer


def begin(device: Plugged[VirtioBlk], start: Start, features: int | None = None) -> Guest:
    """A guest whose worker is idle."""
    guest = start(device, features)
    device.settle()
    assert device.ctx.worker.without_visitor(5)
    return guest


def test_reads_and_writes_of_a_local_file(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int]
) -> None:
    guest = begin(disk(), start)
    assert guest.read(5, 1024) == (OK, b"\5" * 512 + b"\6" * 512)
    assert guest.write(7, b"new!" * 128) == OK
    assert guest.read(7) == (OK, b"new!" * 128)
    assert left == []
    status = guest.device.vdev.status()
    assert (status["reads"], status["writes"], status["bytes_read"]) == (2, 1, 1536)


def test_memory(disk: Disk, start: Start, left: list[int]) -> None:
    guest = begin(disk(hostdev="memory:64K"), start)
    assert guest.write(7, b"new!" * 128) == OK
    assert guest.read(7) == (OK, b"new!" * 128)
    assert left == []


def test_pages_that_are_not_in_memory_are_the_workers(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int]
) -> None:
    nowait.update(preadv=errno.EAGAIN, pwritev=errno.EAGAIN)
    guest = begin(disk(), start)
    assert guest.read(5) == (OK, b"\5" * 512)
    assert guest.write(5, b"new!" * 128) == OK
    assert left == [1, 1]
    assert guest.read(5) == (OK, b"new!" * 128)


def test_a_file_system_that_cannot_tell_of_writes_still_takes_them(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int]
) -> None:
    nowait.update(pwritev=errno.EOPNOTSUPP)
    guest = begin(disk(), start)
    for text in (b"one.", b"two."):
        assert guest.write(5, text * 128) == OK
        assert guest.read(5) == (OK, text * 128)
    assert left == []


def test_a_file_system_that_cannot_tell_of_reads_may_be_far_away(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int]
) -> None:
    nowait.update(preadv=errno.EOPNOTSUPP)
    guest = begin(disk(), start)
    assert guest.read(5) == (OK, b"\5" * 512)
    assert guest.write(5, b"new!" * 128) == OK
    assert left == [1, 1]


@pytest.mark.parametrize("options", [{"dio": "enable"}, {"cache": "writethrough"}])
def test_what_goes_to_the_medium_is_the_workers(
    disk: Disk, start: Start, left: list[int], options: dict[str, str]
) -> None:
    guest = begin(disk(**options), start)
    assert guest.write(5, b"new!" * 128) == OK
    assert left == [1]


@pytest.mark.parametrize(
    ("readable", "room"),
    [
        ([header(FLUSH)], [1]),
        ([header(GET_ID)], [20, 1]),
        ([header(DISCARD), segment(0, 8)], [1]),
    ],
)
def test_other_requests_are_the_workers(
    disk: Disk, start: Start, left: list[int], readable: list[bytes], room: list[int]
) -> None:
    guest = begin(disk(), start)
    assert guest.io(readable, room)[0] == OK
    assert left == [1]


def test_errors_are_the_workers_and_counted_once(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int]
) -> None:
    guest = begin(disk(), start)
    assert guest.read(1000)[0] == IOERR
    nowait.update(preadv=errno.EIO)
    assert guest.read(5) == (OK, b"\5" * 512)  # it went wrong only where it was not to wait
    assert left == [1, 1]
    assert guest.device.vdev.status()["errors"] == 1


def test_writes_to_a_read_only_disk_are_refused(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int]
) -> None:
    for options in ({}, {"hostdev": "memory:64K"}):
        guest = begin(disk(readonly=True, **options), start)
        before = guest.read(5)
        assert guest.write(5, b"new!" * 128) == IOERR
        assert guest.read(5) == before
    assert left == [1, 1]


def test_the_order_is_kept_when_the_worker_takes_over(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int]
) -> None:
    guest = begin(disk(), start)
    queue = guest.driver.queues[0]
    requests = [
        queue.add([header(OUT, 5), b"new!" * 128], [1]),
        queue.add([header(FLUSH)], [1]),
        queue.add([header(IN, 5)], [512, 1]),
    ]
    queue.kick()
    guest.device.settle()
    assert queue.reap() == requests
    assert requests[2].result() == b"new!" * 128 + b"\0"
    assert left == [2]


def test_a_request_that_is_interrupted_is_given_back(
    disk: Disk, start: Start, left: list[int], nowait: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    def hung(*_: object) -> bool:
        raise Interrupted

    monkeypatch.setattr(FileBackend, "write_now", hung)
    guest = begin(disk(), start)
    ring, vdev = guest.driver.queues[0], guest.device.vdev
    request = ring.add([header(OUT, 5), b"new!" * 128], [1])
    ring.publish()
    queue = vdev.virtio.queue(0)
    assert queue is not None
    with pytest.raises(Interrupted):
        vdev.serve_now(0, queue)
    vdev.virtio.kick(0)
    guest.device.settle()
    assert ring.reap() == [request]
    assert request.result() == bytes([OK])
    assert left == [1]
