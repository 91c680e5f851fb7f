"""Backends: bytes where they belong, short transfers, IOV_MAX, truncation, durable writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_blk import backend
from qvm_virtio_blk.backend import Backend, FileBackend, MemoryBackend


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """A zeroed disk of 1 MiB."""
    if request.param == "memory":
        return MemoryBackend(1 << 20)
    return _file(tmp_path)


def _file(tmp_path: Path, size: int = 1 << 20) -> FileBackend:
    (tmp_path / "d").write_bytes(bytes(size))
    return FileBackend(os.open(tmp_path / "d", os.O_RDWR), size)


def _views(data: bytes, piece: int) -> list[memoryview]:
    return [memoryview(bytearray(data[at : at + piece])) for at in range(0, len(data), piece)]


@pytest.mark.parametrize("piece", [1, 512, 700, 1 << 16])
def test_what_was_written_is_read(store: Backend, piece: int) -> None:
    data = os.urandom(4096)
    store.write(1024, 4096, _views(data, piece))
    room = _views(bytes(4608), piece)
    store.read(1024, 4608, room)
    assert b"".join(room) == data + bytes(512)
    store.flush()
    store.close()
    store.close()


def test_more_views_than_iov_max(store: Backend) -> None:
    data = os.urandom(3 * backend.IOV_MAX)
    store.write(0, len(data), _views(data, 1))
    room = _views(bytes(len(data)), 1)
    store.read(0, len(data), room)
    assert b"".join(room) == data
    store.close()


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_read, real_write = os.preadv, os.pwritev

    def first_700(views: Any) -> list[memoryview]:
        return [next(view[:700] for view in views if len(view))]

    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at, flags=0: real_read(fd, first_700(views), at, flags)
    )
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at, _flags: real_write(fd, first_700(views), at))
    store = _file(tmp_path)
    data = os.urandom(4096)
    store.write(0, 4096, _views(data, 1500))
    room = _views(bytes(4096), 1000)
    store.read(0, 4096, room)
    assert b"".join(room) == data
    store.close()


def test_an_image_truncated_under_the_guest_is_an_error(tmp_path: Path) -> None:
    store = _file(tmp_path, 4096)
    os.truncate(tmp_path / "d", 1024)
    with pytest.raises(OSError, match="ends at byte 1024"):
        store.read(512, 1024, _views(bytes(1024), 1024))
    store.close()


def test_a_closed_disk_is_an_error(tmp_path: Path) -> None:
    store = _file(tmp_path)
    store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        store.read(0, 512, _views(bytes(512), 512))


def test_durable_writes_ask_for_it_or_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real_write = os.pwritev

    def write(fd: int, views: Any, at: int, flags: int) -> int:
        calls.append(flags)
        if flags and refuse:
            raise OSError(errno.EOPNOTSUPP, "no RWF_DSYNC")
        return real_write(fd, views, at, 0)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("sync"))
    store, refuse = _file(tmp_path), False
    store.write(0, 512, _views(bytes(512), 512))
    store.write(0, 512, _views(bytes(512), 512), durable=True)
    assert calls == [0, os.RWF_DSYNC]
    calls.clear()
    refuse = True
    for _ in range(2):
        store.write(0, 512, _views(bytes(512), 512), durable=True)
    assert calls == [os.RWF_DSYNC, 0, "sync", 0, "sync"]
    store.close()
