"""Opening disks: sentences for people, and the lock that keeps a second VM out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qvm_virtio_blk.image import open_disk
from qvm_virtio_blk.options import Disk

from qvmcore.api import HostError

_HOLD = """
import sys
from pathlib import Path
from qvm_virtio_blk.image import open_disk
from qvm_virtio_blk.options import Disk
disk = open_disk(Disk(Path(sys.argv[1]), readonly=sys.argv[2] == "ro"), Path())
print("held", flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that has the image open."""

    def __init__(self, image: Path, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(image), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"held\n"

    def kill(self) -> None:
        """kill -9 and reap."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=10)


@pytest.fixture
def writer(image: Path) -> Iterator[Holder]:
    """A process that may write the image."""
    holder = Holder(image, "rw")
    yield holder
    holder.kill()


def _open(path: Path, readonly: bool = False) -> None:
    open_disk(Disk(Path(path.name), readonly=readonly), path.parent).close()


@pytest.mark.parametrize("readonly", [False, True])
def test_an_image_another_process_writes_is_refused_by_its_name(
    image: Path, writer: Holder, readonly: bool
) -> None:
    said = rf"{image} is being (used|written) by process {writer.process.pid} \(py"
    with pytest.raises(HostError, match=said):
        _open(image, readonly)


def test_kill_9_frees_the_lock(image: Path, writer: Holder) -> None:
    with pytest.raises(HostError):
        _open(image)
    writer.kill()
    _open(image)


def test_readers_share_and_keep_a_writer_out(image: Path) -> None:
    holder = Holder(image, "ro")
    _open(image, readonly=True)
    with pytest.raises(HostError, match="readonly = true"):
        _open(image)
    holder.kill()


def test_two_disks_of_one_vm(image: Path) -> None:
    first = open_disk(Disk(image), Path())
    with pytest.raises(HostError, match="another disk of this VM"):
        _open(image)
    first.close()
    first.close()
    _open(image)


def test_a_refused_image_stays_as_it_was_and_no_descriptor_leaks(image: Path, writer: Holder) -> None:
    before, count = image.read_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(HostError):
            _open(image)
    assert len(os.listdir("/proc/self/fd")) == count
    assert image.read_bytes() == before


def test_errors_name_the_path_and_what_to_do(image: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(b"x" * 1000)
    (tmp_path / "big").write_bytes(bytes(512))
    os.mkfifo(tmp_path / "fifo")
    for name, said in (
        ("disc.img", r"cannot open .*disc.img: No such file.*did you mean 'disk.img'"),
        ("zzzzz", "truncate -s 1G"),
        ("no/such/dir/x", "there is no directory"),
        (".", "is a directory"),
        ("empty", "is empty"),
        ("odd", "1000 bytes, which is not a multiple of 512"),
        ("fifo", "neither a file nor a block device"),
        ("disk.img/x", "Not a directory"),
    ):
        with pytest.raises(HostError, match=said):
            open_disk(Disk(Path(name)), tmp_path)
    with pytest.raises(HostError, match="not a multiple of 4096"):
        open_disk(Disk(Path("big")), tmp_path, 4096)


@pytest.fixture
def nobody(image: Path, tmp_path: Path) -> Iterator[None]:
    """Not root, who may read and write everything: root's tests run as nobody meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.usefixtures("nobody")
def test_an_image_that_may_not_be_written_or_read(image: Path) -> None:
    with _as_owner():
        image.chmod(0o444)
    with pytest.raises(HostError, match="readonly = true"):
        _open(image)
    _open(image, readonly=True)
    with _as_owner():
        image.chmod(0)
    with pytest.raises(HostError, match="Permission denied"):
        _open(image, readonly=True)


@contextmanager
def _as_owner() -> Iterator[None]:
    me = os.geteuid()
    os.seteuid(os.getuid())
    yield
    os.seteuid(me)


def test_a_memory_disk_too_big_for_this_machine() -> None:
    with pytest.raises(HostError, match="bytes of memory"):
        open_disk(Disk(Path("x"), memory=1 << 62), Path())
