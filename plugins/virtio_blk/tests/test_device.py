"""The disk as a driver sees it (virtio 1.4, 5.2)."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_blk import spec
from qvm_virtio_blk.device import SEG_MAX, VirtioBlk
from qvm_virtio_blk.testing import FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, Guest, Start, header

from qvmcore.api import HostError
from qvmcore.testing.fakes import Plugged, plug

VERSION_1 = 1 << 32
Disk = Callable[..., Plugged[VirtioBlk]]


def test_5_2_4_configuration(disk: Disk, start: Start) -> None:
    guest = start(disk(block_size="1K", physical_block_size="4K", min_io_size="8K", opt_io_size="64K"))
    config = guest.driver.config
    assert config(0, 8) == 128
    assert config(8, 4) == 0  # SIZE_MAX is not offered
    assert config(12, 4) == SEG_MAX
    assert config(20, 4) == 1024
    assert config(24, 1) == 2  # 4K = 2^2 blocks
    assert (config(26, 2), config(28, 4)) == (8, 64)
    assert config(32, 1) == 1


def test_5_2_3_features(disk: Disk, start: Start) -> None:
    features = start(disk()).driver.features
    assert features & spec.F_FLUSH and features & spec.F_CONFIG_WCE and not features & spec.F_RO


def test_5_2_3_features_of_a_read_only_disk(disk: Disk, start: Start) -> None:
    features = start(disk(readonly=True)).driver.features
    assert features & spec.F_RO and not features & (spec.F_FLUSH | spec.F_CONFIG_WCE)


def test_5_2_6_read(guest: Guest) -> None:
    assert guest.read(5, 1024) == (OK, b"\5" * 512 + b"\6" * 512)


def test_5_2_6_write_reaches_the_image(guest: Guest, image: Path) -> None:
    assert guest.write(7, b"new!" * 128) == OK
    assert image.read_bytes()[7 * 512 : 8 * 512] == b"new!" * 128
    assert guest.read(7) == (OK, b"new!" * 128)


def test_5_2_6_status_is_the_last_writable_byte_wherever_it_lies(guest: Guest) -> None:
    assert guest.io([header(IN, 1)], [513]) == (OK, b"\1" * 512)
    assert guest.io([header(IN, 1)], [100, 412, 1]) == (OK, b"\1" * 512)
    assert guest.io([header(IN, 1)], [511, 2]) == (OK, b"\1" * 512)


def test_5_2_6_header_cut_into_descriptors_and_joined_with_data(guest: Guest) -> None:
    raw = header(OUT, 9) + b"j" * 512
    assert guest.io([raw[:3], raw[3:17], raw[17:]], [1])[0] == OK
    assert guest.read(9) == (OK, b"j" * 512)


def test_2_7_5_3_indirect_descriptors(guest: Guest) -> None:
    guest.driver.queues[0].indirect = True
    assert guest.read(3) == (OK, b"\3" * 512)
    assert guest.write(3, b"i" * 512) == OK
    assert guest.read(3) == (OK, b"i" * 512)


def test_5_2_6_2_write_to_a_read_only_disk(disk: Disk, start: Start, image: Path) -> None:
    before = image.read_bytes()
    guest = start(disk(hostdev=f"< {image}"))
    assert guest.write(0, b"x" * 512) == IOERR
    assert guest.read(1) == (OK, b"\1" * 512)
    assert guest.io([header(FLUSH)], [1])[0] == OK
    assert image.read_bytes() == before


def test_5_2_6_2_write_to_a_read_only_memory_disk(disk: Disk, start: Start) -> None:
    guest = start(disk(hostdev="memory:64K", readonly=True))
    assert guest.write(0, b"x" * 512) == IOERR
    assert guest.read(0) == (OK, bytes(512))


def test_5_2_6_get_id(disk: Disk, start: Start) -> None:
    assert start(disk(serial="QVM-1")).io([header(GET_ID)], [20, 1]) == (OK, b"QVM-1" + bytes(15))


def test_5_2_6_get_id_scattered_and_default(guest: Guest) -> None:
    assert guest.io([header(GET_ID)], [7, 13, 1]) == (OK, b"virtio-blk_test".ljust(20, b"\0"))


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 10, 14, 15, 16, 18, 20, 22, 24, 26, 0x8000_0000, 0xFFFF_FFFF])
def test_5_2_6_unknown_type_is_unsupp(guest: Guest, kind: int) -> None:
    assert guest.io([header(kind)], [512, 1])[0] == UNSUPP
    assert guest.alive()


def _most_segments(guest: Guest) -> int:
    """Status of a write of 255 segments: the first one shares a descriptor with the header."""
    guest.driver.queues[0].indirect = True
    return guest.io([header(OUT) + b"x" * 512, *[b"x" * 512] * SEG_MAX], [1])[0]


def test_5_2_6_more_segments_than_seg_max(disk: Disk, start: Start) -> None:
    guest = start(disk(hostdev="memory:1M"))
    assert _most_segments(guest) == IOERR
    assert guest.read(0) == (OK, bytes(512))
    assert guest.io([header(IN)], [512] * SEG_MAX + [1])[0] == OK


def test_5_2_6_seg_max_binds_only_who_negotiated_it(disk: Disk, start: Start) -> None:
    indirect = 1 << 28
    assert _most_segments(start(disk(hostdev="memory:1M"), VERSION_1 | indirect)) == OK


def test_5_2_6_2_flush_syncs(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    assert guest.write(0, b"x" * 512) == OK
    assert not calls
    assert guest.io([header(FLUSH, 99)], [1])[0] == OK
    assert len(calls) == 1


def _flags(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The flags of every pwritev that wrote from here on, but that it was not to wait."""
    seen: list[int] = []
    real = os.pwritev

    def write(fd: int, views: Any, at: int, flags: int) -> int:
        done = real(fd, views, at, flags)
        seen.append(flags & ~os.RWF_NOWAIT)
        return done

    monkeypatch.setattr(os, "pwritev", write)
    return seen


def test_5_2_5_2_without_flush_every_write_is_durable(
    disk: Disk, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = _flags(monkeypatch)
    guest = start(disk(), VERSION_1 | spec.F_CONFIG_WCE)
    assert guest.driver.config(32, 1) == 0
    assert guest.write(0, b"x" * 512) == OK
    assert flags == [os.RWF_DSYNC]


def test_5_2_6_1_the_driver_switches_the_cache(
    disk: Disk, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = _flags(monkeypatch)
    guest = start(disk())
    for mode in (0, 1, 0):
        guest.driver.write_config(32, 1, mode)
        assert guest.driver.config(32, 1) == mode
        assert guest.write(0, b"x" * 512) == OK
    assert flags == [os.RWF_DSYNC, 0, os.RWF_DSYNC]
    guest.driver.start()
    assert guest.driver.config(32, 1) == 1, "the next driver starts with the configured mode"


@pytest.mark.parametrize(
    ("offset", "size", "value"), [(32, 1, 2), (32, 4, 0), (31, 1, 0), (0, 4, 0), (33, 1, 0)]
)
def test_5_2_4_nothing_else_of_the_configuration_is_writable(
    guest: Guest, offset: int, size: int, value: int
) -> None:
    before = [guest.driver.config(at, 4) for at in range(0, 36, 4)]
    guest.driver.write_config(offset, size, value)
    assert [guest.driver.config(at, 4) for at in range(0, 36, 4)] == before


def test_5_2_4_writeback_needs_config_wce(disk: Disk, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = _flags(monkeypatch)
    guest = start(disk(), VERSION_1 | spec.F_FLUSH)
    guest.driver.write_config(32, 1, 0)
    assert guest.write(0, b"x" * 512) == OK and flags == [0]


def test_cache_writethrough_option(disk: Disk, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = _flags(monkeypatch)
    guest = start(disk(cache="writethrough"))
    assert guest.driver.config(32, 1) == 0
    assert guest.write(0, b"x" * 512) == OK and flags == [os.RWF_DSYNC]


def test_a_host_error_is_ioerr_and_logged_once(
    guest: Guest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, views: object, at: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        for _ in range(20):
            assert guest.read(100)[0] == IOERR
    assert caplog.text.count("host: Input/output error") == 1
    assert guest.alive()
    assert guest.device.vdev.status()["errors"] == 20


def test_many_requests_in_one_notification(guest: Guest) -> None:
    queue = guest.driver.queues[0]
    requests = [queue.add([header(IN, n)], [512, 1]) for n in range(80)]
    queue.kick()
    guest.device.settle()
    queue.reap()
    assert [request.result() for request in requests] == [bytes([n]) * 512 + b"\0" for n in range(80)]


def test_status_is_json_and_counts(guest: Guest) -> None:
    guest.read(0, 1024)
    guest.write(0, b"x" * 512)
    guest.io([header(FLUSH)], [1])
    guest.io([header(99)], [1])
    status = guest.device.vdev.status()
    json.dumps(status)
    names = ("reads", "writes", "flushes", "errors", "bytes_read", "bytes_written")
    assert [status[name] for name in names] == [1, 1, 1, 1, 1024, 512]


def test_the_end_flushes_then_unlocks(disk: Disk, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    device = disk()
    monkeypatch.setattr(os, "fdatasync", lambda fd: order.append("flush"))
    with pytest.raises(HostError, match="another disk of this VM"):
        disk()
    results = device.terminate()
    assert [result.verdict for result in results] == ["ok"] * len(results)
    assert order == ["flush"]
    disk().terminate()


def test_the_end_is_harmless_after_a_half_made_start_and_twice(disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        plug(VirtioBlk, hostdev=str(tmp_path / "absent"))
    device = disk()
    device.terminate()
    device.vdev.on_terminate(None)  # type: ignore[arg-type]
    device.vdev.on_terminate(None)  # type: ignore[arg-type]


def test_a_relative_path_starts_at_the_vm_file(start: Start, image: Path) -> None:
    with plug(VirtioBlk, base_dir=image.parent, hostdev=f"<{image.name}") as device:
        assert start(device).read(4) == (OK, b"\4" * 512)


def test_memory_disk(disk: Disk, start: Start) -> None:
    guest = start(disk(hostdev="memory:64K"))
    assert guest.driver.config(0, 8) == 128
    assert guest.read(127) == (OK, bytes(512))
    assert guest.write(127, b"m" * 512) == OK
    assert guest.read(127) == (OK, b"m" * 512)
    assert guest.read(128)[0] == IOERR
    assert guest.io([header(FLUSH)], [1])[0] == OK
