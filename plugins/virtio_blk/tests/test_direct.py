"""Direct I/O: the same bytes past the page cache, whatever the alignment; off for good when it fails."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_blk import direct
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.direct import DirectBackend
from qvm_virtio_blk.testing import OK, Start

from qvmcore.api import ConfigError
from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]
SIZE = 4 << 20
LOG = logging.LoggerAdapter(logging.getLogger("qvm.vdev.test"), {})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image of random bytes; skips where the file system cannot do direct I/O."""
    path = tmp_path / "direct.img"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no direct I/O in {tmp_path}: {error}")
    return path


@pytest.fixture
def store(path: Path) -> Iterator[DirectBackend]:
    """Direct reads and writes."""
    backend = DirectBackend(os.open(path, os.O_RDWR), SIZE, writes=True, log=LOG)
    assert backend.direct
    yield backend
    backend.close()


class Calls:
    """Counts transfers by whether their descriptor is a direct one, and may let direct ones fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.direct = self.cached = 0
        self.error = 0
        for name in ("preadv", "pwritev"):
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, views: Any, at: int, *flags: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                self.direct += 1
                if self.error:
                    raise OSError(self.error, os.strerror(self.error))
            else:
                self.cached += 1
            return real(fd, views, at, *flags)

        return call


def aligned(length: int) -> memoryview:
    """Memory that begins at a page."""
    return memoryview(mmap.mmap(-1, length))


def askew(length: int) -> list[memoryview]:
    """Memory at odd addresses, in odd pieces."""
    base = memoryview(bytearray(length + 64))[1 : length + 1]
    return [base[:777], base[777:778], base[778:]]


def test_aligned_transfers_are_direct(
    store: DirectBackend, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    room, content = aligned(8192), path.read_bytes()
    store.read(4096, 8192, [room])
    assert room == content[4096:12288]
    room[:] = b"w" * 8192
    store.write(65536, 8192, [room[:4096], room[4096:]], durable=True)
    assert (calls.direct, calls.cached) == (2, 0)
    assert path.read_bytes()[65536:73728] == b"w" * 8192


@pytest.mark.parametrize("length", [4096, 3 << 20])
def test_buffers_that_lie_askew_are_bounced(
    store: DirectBackend, path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    calls = Calls(monkeypatch)
    content = path.read_bytes()
    room = askew(length)
    store.read(4096, length, room)
    assert b"".join(room) == content[4096 : 4096 + length]
    data = random.Random(4).randbytes(length)
    done = 0
    for view in room:
        view[:] = data[done : done + len(view)]
        done += len(view)
    store.write(8192, length, room)
    assert path.read_bytes() == content[:8192] + data + content[8192 + length :]
    assert calls.direct and not calls.cached and store.direct


def test_mixed_with_cached_transfers_nothing_is_lost(store: DirectBackend, path: Path) -> None:
    store._align = 4096  # as on a disk of such sectors
    dice = random.Random(5)
    content = bytearray(path.read_bytes())
    for _ in range(300):
        sector, count = dice.randrange(SIZE // 512 - 64), dice.randrange(1, 64)
        at, length = sector * 512, count * 512
        room = dice.choice([lambda n: [aligned(n)], lambda n: [memoryview(bytearray(n + 1))[1:]]])(length)
        if dice.random() < 0.5:
            data = dice.randbytes(length)
            room[0][:] = data
            store.write(at, length, room)
            content[at : at + length] = data
        else:
            store.read(at, length, room)
            assert room[0] == content[at : at + length]
    assert path.read_bytes() == content and store.direct


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("name", ["read", "write"])
def test_one_failure_switches_it_off_for_good(
    store: DirectBackend, path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, name: str, error: int,
) -> None:  # fmt: skip
    calls = Calls(monkeypatch)
    calls.error = error
    content = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            room = aligned(4096)
            room[:] = content[:4096]
            getattr(store, name)(0, 4096, [room])
            assert room == content[:4096]
    assert not store.direct and calls.direct <= 2 and calls.cached == 3
    assert caplog.text.count("direct I/O is off from now on") == 1
    assert path.read_bytes() == content


def test_a_full_disk_is_no_failure_of_direct_io(
    store: DirectBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    calls.error = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        store.write(0, 4096, [aligned(4096)])
    assert store.direct


def test_an_image_truncated_under_the_guest_is_an_error(store: DirectBackend, path: Path) -> None:
    os.truncate(path, 8192)
    with pytest.raises(OSError, match="ends at byte 8192"):
        store.read(4096, 16384, [aligned(16384)])


@pytest.mark.parametrize(("dio", "reads", "writes"), [("enable", 1, 1), ("read", 1, 0), ("disable", 0, 0)])
def test_dio_option(
    disk: Disk, start: Start, path: Path, monkeypatch: pytest.MonkeyPatch, dio: str, reads: int, writes: int
) -> None:
    guest = start(disk(hostdev=str(path), dio=dio))
    content = path.read_bytes()
    calls = Calls(monkeypatch)
    assert guest.read(8, 4096) == (OK, content[4096:8192])
    assert bool(calls.direct) == bool(reads)
    calls.direct = 0
    assert guest.write(8, b"d" * 4096) == OK
    assert bool(calls.direct) == bool(writes)
    assert path.read_bytes()[4096:8192] == b"d" * 4096
    assert guest.read(8, 4096) == (OK, b"d" * 4096)


def test_dio_where_the_host_has_none_is_logged_and_works(
    disk: Disk, start: Start, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(direct.os, "open", refuse)
    with caplog.at_level(logging.WARNING):
        guest = start(disk(hostdev=str(path), dio="enable"))
    assert "direct I/O is off from now on: Invalid argument" in caplog.text
    assert guest.alive()


@pytest.mark.parametrize("hostdev", ["memory:1M", "nbd://localhost/"])
def test_dio_is_for_files(disk: Disk, hostdev: str) -> None:
    with pytest.raises(ConfigError, match="dio is for files and block devices"):
        disk(hostdev=hostdev, dio="read")
