"""Whatever the host's storage does wrong is IOERR to the guest, and the disk works on (5.2.6)."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from qvm_virtio_blk import device as device_module
from qvm_virtio_blk import spec
from qvm_virtio_blk.backend import MemoryBackend
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import DISCARD, FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES, Start, header, segment

from qvmcore.api import HostError
from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]


class Faulty(MemoryBackend):
    """A disk whose operations fail with ``error`` while that is set."""

    def __init__(self) -> None:
        super().__init__(128 * 512)
        self.error = 0

    def _maybe(self) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def measure(self) -> int:
        self._maybe()
        return super().measure()

    def read(self, offset: int, length: int, views: Sequence[memoryview]) -> None:
        self._maybe()
        super().read(offset, length, views)

    def write(self, offset: int, length: int, views: Sequence[memoryview], *, durable: bool = False) -> None:
        self._maybe()
        super().write(offset, length, views, durable=durable)

    def discard(self, offset: int, length: int) -> None:
        self._maybe()
        super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._maybe()
        super().write_zeroes(offset, length, unmap)

    def flush(self) -> None:
        self._maybe()


@pytest.mark.parametrize(
    "error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENXIO, errno.EBADF]
)
@pytest.mark.parametrize("kind", [IN, OUT, FLUSH, DISCARD, WRITE_ZEROES])
def test_5_2_6_every_error_of_every_operation(
    disk: Disk, start: Start, monkeypatch: pytest.MonkeyPatch, kind: int, error: int
) -> None:
    faulty = Faulty()
    monkeypatch.setattr(device_module, "open_disk", lambda *_: faulty)
    guest = start(disk())
    data = {IN: [], OUT: [b"x" * 512], FLUSH: []}.get(kind, [segment(0, 1)])
    room = [512, 1] if kind == IN else [1]
    for fails in (True, False, True):
        faulty.error = error if fails else 0
        assert guest.io([header(kind), *data], room)[0] == (IOERR if fails else OK)
    faulty.error = 0
    assert guest.alive()


def test_an_error_of_the_last_flush_is_told_and_the_disk_is_closed(
    disk: Disk, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = Faulty()
    monkeypatch.setattr(device_module, "open_disk", lambda *_: faulty)
    device = disk()
    faulty.error = errno.EIO
    failed = [result for result in device.terminate() if result.verdict != "ok"]
    assert len(failed) == 1 and "Input/output error" in str(failed[0])


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB that is really full soon; skips without the right to mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_5_2_6_a_full_file_system(disk: Disk, start: Start, tiny: Path) -> None:
    image = tiny / "disk.img"
    image.touch()
    os.truncate(image, 4 << 20)
    guest = start(disk(hostdev=str(image)))
    statuses = [guest.write(sector, b"f" * 65536) for sector in range(0, 1024, 128)]
    assert statuses[0] == OK and statuses[-1] == IOERR
    assert guest.alive()
    assert guest.ranges(DISCARD, segment(0, 128)) == OK
    assert guest.write(0, b"again" + bytes(4091)) == OK, "a discard makes room"


# ---- a real block device -------------------------------------------------------------------------


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A loop device of 1 MiB and the file behind it; skips without the right to make one."""
    program = shutil.which("losetup", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if program is None or os.geteuid():
        pytest.skip("a block device needs losetup and root")
    backing = tmp_path / "backing.img"
    backing.write_bytes(b"\xaa" * (1 << 20))
    made = subprocess.run([program, "-f", "--show", backing], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    yield device, backing
    subprocess.run([program, "-d", device], check=True)


@pytest.mark.parametrize("dio", ["disable", "enable"])
def test_block_device(disk: Disk, start: Start, loop: tuple[Path, Path], dio: str) -> None:
    device, backing = loop
    assert stat.S_ISBLK(device.stat().st_mode)
    plugged = disk(hostdev=str(device), dio=dio)
    guest = start(plugged)
    assert guest.driver.config(0, 8) == 2048 and guest.driver.features & spec.F_DISCARD
    with pytest.raises(HostError, match=r"otherwise in use|being used"):
        disk(hostdev=str(device))
    assert guest.write(9, b"b" * 512) == OK and guest.read(9) == (OK, b"b" * 512)
    assert guest.io([header(FLUSH)], [1])[0] == OK
    assert backing.read_bytes()[9 * 512 : 10 * 512] == b"b" * 512
    before = backing.stat().st_blocks
    assert guest.ranges(DISCARD, segment(0, 1024)) == OK
    assert backing.stat().st_blocks == before - 1024
    assert guest.ranges(WRITE_ZEROES, segment(1025, 7), segment(1536, 256, 1)) == OK
    assert guest.read(1024, 4096) == (OK, b"\xaa" * 512 + bytes(7 * 512))
    assert guest.read(1536, 256 * 512) == (OK, bytes(256 * 512))
    assert guest.read(1792) == (OK, b"\xaa" * 512)
    assert backing.stat().st_blocks <= before - 1024 - 256
    plugged.terminate()


def test_5_2_6_2_block_device_grows(disk: Disk, start: Start, loop: tuple[Path, Path]) -> None:
    device, backing = loop
    plugged = disk(hostdev=str(device))
    guest = start(plugged)
    os.truncate(backing, 2 << 20)
    subprocess.run(["losetup", "-c", device], check=True, env={**os.environ, "PATH": "/sbin:/usr/sbin:/bin"})
    assert guest.write(0, bytes(512)) == OK and guest.driver.config(0, 8) == 4096
    assert guest.read(4095) == (OK, bytes(512))
    plugged.terminate()
