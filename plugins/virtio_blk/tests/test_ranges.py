"""DISCARD and WRITE_ZEROES as a driver sees them, kind or hostile, and the holes they leave (5.2.6)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from qvm_virtio_blk import holes, spec
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.request import (
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEG,
    MAX_ZEROES_SECTORS,
    MAX_ZEROES_SEG,
)
from qvm_virtio_blk.testing import DISCARD, IOERR, OK, UNSUPP, WRITE_ZEROES, Guest, Start, header, segment

from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]
BOTH = pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
UNMAP = 1


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """An image of 1 MiB without holes; skips where the file system cannot make any."""
    path = tmp_path / "big.img"
    path.write_bytes(b"\xaa" * (1 << 20))
    with path.open("r+b") as image:
        os.fsync(image.fileno())
        if not holes.Holes(image.fileno(), 1 << 20).can_discard:
            pytest.skip(f"the file system of {tmp_path} makes no holes")
    return path


def test_5_2_4_limits_in_the_configuration(disk: Disk, start: Start, big: Path) -> None:
    config = start(disk(hostdev=str(big))).driver.config
    assert [config(at, 4) for at in (36, 40, 44)] == [MAX_DISCARD_SECTORS, MAX_DISCARD_SEG, 8]
    assert [config(at, 4) for at in (48, 52)] == [MAX_ZEROES_SECTORS, MAX_ZEROES_SEG]
    assert config(56, 1) == 1
    assert [config(at, 1) for at in (33, 57, 58, 59)] == [0, 0, 0, 0]  # 5.2.5.2: padding


def test_5_2_3_a_read_only_disk_offers_neither(disk: Disk, start: Start) -> None:
    guest = start(disk(readonly=True))
    assert not guest.driver.features & (spec.F_DISCARD | spec.F_WRITE_ZEROES)
    assert [guest.driver.config(at, 4) for at in range(36, 60, 4)] == [0] * 6
    assert guest.ranges(WRITE_ZEROES, segment(0, 1)) == UNSUPP


def test_5_2_6_2_discard_gives_the_blocks_of_the_image_back(disk: Disk, start: Start, big: Path) -> None:
    guest = start(disk(hostdev=str(big)))
    before = big.stat().st_blocks
    assert guest.ranges(DISCARD, segment(0, 512), segment(1024, 256)) == OK
    assert big.stat().st_blocks == before - 768
    assert big.stat().st_size == 1 << 20
    assert guest.read(512) == (OK, b"\xaa" * 512)
    status = guest.device.vdev.status()
    assert (status["discards"], status["bytes_discarded"]) == (1, 768 * 512)


def test_5_2_6_2_write_zeroes_with_unmap_makes_a_hole(disk: Disk, start: Start, big: Path) -> None:
    guest = start(disk(hostdev=str(big)))
    before = big.stat().st_blocks
    assert guest.ranges(WRITE_ZEROES, segment(8, 256, UNMAP)) == OK
    assert big.stat().st_blocks == before - 256
    assert big.read_bytes()[: 300 * 512] == b"\xaa" * 4096 + bytes(256 * 512) + b"\xaa" * (36 * 512)


def test_5_2_6_2_write_zeroes_without_unmap_keeps_the_blocks(disk: Disk, start: Start, big: Path) -> None:
    guest = start(disk(hostdev=str(big)))
    before = big.stat().st_blocks
    assert guest.ranges(WRITE_ZEROES, segment(3, 509), segment(2047, 1)) == OK
    assert big.stat().st_blocks == before
    data = big.read_bytes()
    assert data[: 512 * 512] == b"\xaa" * 1536 + bytes(509 * 512)
    assert data[-1024:] == b"\xaa" * 512 + bytes(512)


@pytest.mark.parametrize("flags", [0, UNMAP])
@pytest.mark.parametrize("absent", [errno.EOPNOTSUPP, errno.EINVAL])
def test_5_2_6_2_write_zeroes_on_a_host_that_can_only_write(
    disk: Disk, start: Start, big: Path, monkeypatch: pytest.MonkeyPatch, absent: int, flags: int
) -> None:
    calls: list[int] = []

    def no(fd: int, offset: int, length: int) -> None:
        calls.append(offset)
        raise OSError(absent, "absent")

    monkeypatch.setattr(holes, "punch_hole", no)
    monkeypatch.setattr(holes, "zero_range", no)
    guest = start(disk(hostdev=str(big)))
    assert not guest.driver.features & spec.F_DISCARD
    assert guest.driver.config(56, 1) == 0
    calls.clear()
    for _ in range(3):
        assert guest.ranges(WRITE_ZEROES, segment(1, 2046, flags)) == OK
    assert big.read_bytes() == b"\xaa" * 512 + bytes(2046 * 512) + b"\xaa" * 512
    assert len(calls) == (1 if absent == errno.EOPNOTSUPP else 3), "what is absent is not asked for twice"


def test_5_2_6_2_an_error_of_the_host_is_ioerr(
    disk: Disk, start: Start, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(holes, "zero_range", full)
    guest = start(disk(hostdev=str(big)))
    assert guest.ranges(WRITE_ZEROES, segment(0, 8)) == IOERR
    assert guest.alive() and big.read_bytes() == b"\xaa" * (1 << 20)


@BOTH
def test_5_2_6_1_durable_when_the_cache_is_write_through(
    disk: Disk, start: Start, big: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    guest = start(disk(hostdev=str(big)))
    assert guest.ranges(kind, segment(0, 8)) == OK and not calls
    guest.driver.write_config(32, 1, 0)
    assert guest.ranges(kind, segment(0, 8)) == OK and len(calls) == 1


@BOTH
def test_5_2_6_how_segments_are_cut_into_descriptors_means_nothing(
    disk: Disk, start: Start, big: Path, kind: int
) -> None:
    guest = start(disk(hostdev=str(big)))
    raw = header(kind) + segment(0, 8) + segment(16, 8)
    assert guest.io([raw[:5], raw[5:30], raw[30:]], [1])[0] == OK
    assert big.read_bytes()[: 24 * 512] == bytes(4096) + b"\xaa" * 4096 + bytes(4096)


def test_memory_disk_forgets(disk: Disk, start: Start) -> None:
    guest = start(disk(hostdev="memory:1M"))
    for sector in range(32):
        guest.write(sector, b"x" * 512)
    assert guest.ranges(DISCARD, segment(8, 8), segment(17, 2)) == OK
    assert guest.read(8, 4096) == (OK, bytes(4096))
    assert guest.read(17) == (OK, b"x" * 512), "less than a page is kept"
    assert guest.ranges(WRITE_ZEROES, segment(1, 1), segment(3, 22, UNMAP)) == OK
    zeros = {1, *range(3, 25)}
    zeros |= set(range(8, 16))
    for sector in range(32):
        assert guest.read(sector) == (OK, bytes(512) if sector in zeros else b"x" * 512), sector


# ---- abuse ---------------------------------------------------------------------------------------


def _untouched(guest: Guest, image: Path, status: int, *, kind: int, segments: list[bytes]) -> None:
    before = image.read_bytes()
    assert guest.ranges(kind, *segments) == status
    assert guest.alive() and image.read_bytes() == before


@BOTH
def test_5_2_6_without_the_feature_is_unsupp(disk: Disk, start: Start, image: Path, kind: int) -> None:
    guest = start(disk(), 1 << 32 | spec.F_FLUSH)
    _untouched(guest, image, UNSUPP, kind=kind, segments=[segment(0, 8)])


@BOTH
@pytest.mark.parametrize("flags", [2, 3, 1 << 31, 0xFFFFFFFF])
def test_5_2_6_2_unknown_flags_are_unsupp(guest: Guest, image: Path, kind: int, flags: int) -> None:
    _untouched(guest, image, UNSUPP, kind=kind, segments=[segment(0, 1), segment(1, 1, flags)])


def test_5_2_6_2_unmap_of_a_discard_is_unsupp(guest: Guest, image: Path) -> None:
    _untouched(guest, image, UNSUPP, kind=DISCARD, segments=[segment(0, 1, UNMAP)])


@BOTH
@pytest.mark.parametrize("length", [0, 1, 15, 17, 31])
def test_5_2_6_data_not_a_multiple_of_16(guest: Guest, image: Path, kind: int, length: int) -> None:
    _untouched(guest, image, IOERR, kind=kind, segments=[(segment(0, 1) * 2)[:length]])


@pytest.mark.parametrize(("kind", "most"), [(DISCARD, MAX_DISCARD_SEG), (WRITE_ZEROES, MAX_ZEROES_SEG)])
def test_5_2_6_too_many_segments(guest: Guest, image: Path, kind: int, most: int) -> None:
    _untouched(guest, image, IOERR, kind=kind, segments=[segment(0, 1)] * (most + 1))
    assert guest.ranges(kind, *[segment(1, 1)] * most) == OK


@BOTH
@pytest.mark.parametrize(
    ("sector", "sectors"),
    [
        (128, 1),
        (127, 2),
        (129, 0),
        (0, 129),
        (1 << 55, 8),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 8, 8),
        (0, 1 << 31),
    ],
)
def test_5_2_6_beyond_the_capacity_or_wrapping(
    guest: Guest, image: Path, kind: int, sector: int, sectors: int
) -> None:
    _untouched(guest, image, IOERR, kind=kind, segments=[segment(0, 1), segment(sector, sectors)])


@BOTH
def test_5_2_6_no_sectors_do_nothing_even_at_the_capacity(guest: Guest, image: Path, kind: int) -> None:
    _untouched(guest, image, OK, kind=kind, segments=[segment(0, 0), segment(128, 0)])


@pytest.mark.parametrize(
    ("kind", "most"), [(DISCARD, MAX_DISCARD_SECTORS), (WRITE_ZEROES, MAX_ZEROES_SECTORS)]
)
def test_5_2_6_more_sectors_than_the_limit(disk: Disk, start: Start, kind: int, most: int) -> None:
    guest = start(disk(hostdev="memory:2G"))
    assert guest.ranges(kind, segment(0, most)) == OK
    assert guest.ranges(kind, segment(0, most + 1)) == IOERR
    assert guest.alive()


@BOTH
def test_5_2_6_overlapping_segments(guest: Guest, image: Path, kind: int) -> None:
    assert guest.ranges(kind, segment(0, 16), segment(8, 16), segment(0, 24)) == OK
    assert image.read_bytes()[: 25 * 512] == bytes(24 * 512) + bytes([24]) * 512


@BOTH
def test_5_2_6_no_status_byte_needs_a_reset(guest: Guest, kind: int) -> None:
    request = guest.submit([header(kind), segment(0, 1)], [])
    assert not request.done and guest.driver.needs_reset
    guest.driver.start()
    assert guest.alive()
