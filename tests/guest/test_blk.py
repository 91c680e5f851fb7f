"""Linux's virtio_blk on qvm's disk: what it flushed is safe, what it discards is given back.

The image is looked at on the host, where the truth is.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_server import Server

Start = Callable[..., Any]
SBIN = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"}


def vdev(hostdev: object, **options: object) -> str:
    """The ``[[vdev]]`` table of a disk."""
    more = "".join(f"{key} = {value!r}\n".replace("True", "true") for key, value in options.items())
    return (
        f'[[vdev]]\ntype = "virtio-blk"\nname = "disk0"\nloc = 0x1c0d0000\nintr = "gic:41"\n'
        f'hostdev = "{hostdev}"\n{more}'
    )


def ext4(path: Path, size: int = 64 << 20) -> Path:
    """A fresh file system in an image without holes, so that new holes are seen."""
    if shutil.which("mke2fs", path=SBIN["PATH"]) is None:
        pytest.skip("mke2fs is not installed (Debian: e2fsprogs)")
    path.write_bytes(b"\xaa" * size)
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-E", "nodiscard", "-F", path], check=True, env=SBIN
    )
    return path


def fsck(path: Path) -> None:
    """The file system is clean, without any repair."""
    done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, env=SBIN)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- what was flushed survives kill -9 -----------------------------------------------------------

#: Numbered blocks, each flushed before it is logged; the block tells its number in every byte pair.
WRITER = r"""
n=0
while :; do
    at=$(( (n * 7919) % 4096 ))
    yes "block $n" 2>/dev/null |
        dd of=/dev/vda bs=4096 seek=$at count=1 iflag=fullblock conv=notrunc,fsync 2>/dev/null
    echo "flushed $n at $at."
    n=$((n + 1))
done
"""


@pytest.mark.parametrize(
    ("seed", "options"),
    [(1, {}), (2, {"dio": "enable"}), (3, {"cache": "writethrough"}), (4, {"queues": 4})],
    ids=["cached", "direct", "writethrough", "queues"],
)
def test_kill_9_after_a_flush_loses_nothing(
    start: Start, tmp_path: Path, seed: int, options: dict[str, object]
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(16 << 20))
    dice = random.Random(seed)
    vm = start(WRITER, vdevs=vdev(disk, **options))
    vm.expect(f"flushed {dice.randrange(5, 30)} at")
    time.sleep(dice.random() / 4)  # anywhere in a write, a flush, or between
    vm.send(signal.SIGKILL)
    vm.wait(30)
    check_flushed(vm.text, disk)


def check_flushed(text: str, disk: Path) -> None:
    """Every block the guest has told of is on the disk, whole."""
    data = disk.read_bytes()
    told = re.findall(r"flushed (\d+) at (\d+)\.", text)
    assert len(told) >= 5
    for number, at in told:
        line = f"block {number}\n".encode()
        wanted = (line * 4096)[:4096]
        assert data[int(at) * 4096 : (int(at) + 1) * 4096] == wanted, f"block {number} is lost"


# ---- random writes, verified, on a file system ---------------------------------------------------

VERIFY = r"""
fail() { echo "verify: FAIL $1"; exit 1; }
mount -t ext4 /dev/vda /mnt || fail mount
dd if=/dev/urandom of=/tmp/model bs=64k count=64 2>/dev/null
cp /tmp/model /mnt/file
n=0
while [ $n -lt 40 ]; do
    at=$(( (n * 104729 + 17) % 1000 ))
    dd if=/dev/urandom of=/tmp/r bs=4k count=$((n % 7 + 1)) 2>/dev/null
    for file in /tmp/model /mnt/file; do
        dd if=/tmp/r of=$file bs=4k seek=$at conv=notrunc 2>/dev/null || fail write
    done
    case $n in *5)
        sync; echo 3 > /proc/sys/vm/drop_caches
        cmp /tmp/model /mnt/file || fail "compare $n" ;;
    esac
    n=$((n + 1))
done
mkdir /mnt/many; n=0
while [ $n -lt 60 ]; do echo $n > /mnt/many/$n; n=$((n + 1)); done
rm /mnt/many/*7
dd if=/dev/urandom of=/mnt/gone bs=1M count=16 2>/dev/null
sync; rm /mnt/gone; sync
fstrim /mnt || fail fstrim
echo 3 > /proc/sys/vm/drop_caches
cmp /tmp/model /mnt/file || fail "the last compare"
umount /mnt
echo "verify: ok"
"""


@pytest.mark.parametrize(
    "options", [{}, {"dio": "enable", "queues": 2}, {"block_size": "4K"}], ids=["cached", "direct", "4K"]
)
def test_random_writes_verify_and_the_file_system_is_clean(
    start: Start, tmp_path: Path, options: dict[str, object]
) -> None:
    disk = ext4(tmp_path / "disk.img")
    before = disk.stat().st_blocks
    vm = start(VERIFY, vdevs=vdev(disk, **options))
    assert vm.wait() == 0
    assert "verify: ok" in vm.text, vm.text
    fsck(disk)
    # 5.2.6.2: fstrim gave nearly everything back; 16 MiB of it were a file a moment ago.
    assert disk.stat().st_blocks < before // 2


# ---- the driver's view ---------------------------------------------------------------------------

FEATURES = r"""
b=/sys/block/vda
echo "serial: $(cat $b/serial)"
echo "size: $(cat $b/size)"
echo "cache: $(cat $b/queue/write_cache) $(cat $b/cache_type)"
echo "write through" > $b/cache_type && echo "toggled: $(cat $b/cache_type)"
echo "discard: $(cat $b/queue/discard_max_bytes) $(cat $b/queue/discard_granularity)"
echo "zeroes: $(cat $b/queue/write_zeroes_max_bytes)"
echo "queues: $(ls $b/mq)"
blkdiscard -o 1048576 -l 2097152 /dev/vda && echo "discarded"
echo "grow me"
while [ "$(cat $b/size)" = 32768 ]; do sleep 0.1; done
echo "grown: $(cat $b/size)"
dd if=/dev/urandom of=/tmp/r bs=4k count=4 2>/dev/null
dd if=/tmp/r of=/dev/vda bs=4k seek=5000 conv=notrunc,fsync 2>/dev/null && echo "behind: $(md5sum < /tmp/r)"
echo "shrink me"
while [ "$(cat $b/size)" = 65536 ]; do sleep 0.1; done
echo "shrunk: $(cat $b/size)"
dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct && echo "still reads"
"""


def test_features_discard_and_resize_as_linux_sees_them(start: Start, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"\xaa" * (16 << 20))
    before = disk.stat().st_blocks
    vm = start(FEATURES, vdevs=vdev(disk, serial="QVM-178", queues=4))
    vm.expect("grow me")
    assert disk.stat().st_blocks == before - (2 << 20) // 512
    os.truncate(disk, 32 << 20)
    vm.expect("shrink me")
    behind = disk.read_bytes()[5000 * 4096 : 5004 * 4096]
    os.truncate(disk, 8 << 20)
    assert vm.wait() == 0
    text = vm.text
    assert "serial: QVM-178" in text and "size: 32768" in text, text
    assert "cache: write back write back" in text and "toggled: write through" in text, text
    assert "discard: 1073741824 4096" in text and "zeroes: 16777216" in text, text
    assert "discarded" in text and "grown: 65536" in text and "shrunk: 16384" in text, text
    assert "still reads" in text, text
    assert f"behind: {hashlib.md5(behind).hexdigest()}" in text


def test_a_disk_that_comes_while_the_guest_runs(start: Start, tmp_path: Path) -> None:
    disk = tmp_path / "late.img"
    script = """
    echo "size: $(cat /sys/block/vda/size)"
    while [ "$(cat /sys/block/vda/size)" = 0 ]; do sleep 0.1; done
    echo "came: $(cat /sys/block/vda/size) $(head -c 5 /dev/vda)"
    """
    vm = start(script, vdevs=vdev(disk, delayed="forever"))
    vm.expect("size: 0")
    (tmp_path / "making").write_bytes(b"hello" + bytes((1 << 20) - 5))
    (tmp_path / "making").rename(disk)
    assert vm.wait() == 0
    assert "came: 2048 hello" in vm.text


# ---- a disk on an NBD server ---------------------------------------------------------------------


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server of a fresh ext4, not running yet."""
    server = Server(tmp_path, ext4(tmp_path / "disk.img"), request.param)
    yield server
    server.kill()


def test_nbd_server_killed_under_load_and_back_again(start: Start, server: Server, tmp_path: Path) -> None:
    server.start()
    script = VERIFY.replace("cp /tmp/model", "echo mounted; cp /tmp/model")
    vm = start(script, vdevs=vdev(server.uri))
    vm.expect("mounted")
    for _ in range(3):
        time.sleep(0.4)
        server.kill()
        time.sleep(0.2)
        server.start()
    assert vm.wait() == 0
    assert "verify: ok" in vm.text, vm.text
    assert "connected to nbd" in vm.text and "I/O error" not in vm.text, vm.text
    server.kill()
    fsck(tmp_path / "disk.img")


def test_nbd_kill_9_after_a_flush_loses_nothing(start: Start, server: Server, tmp_path: Path) -> None:
    server.start()
    vm = start(WRITER, vdevs=vdev(server.uri))
    vm.expect("flushed 12 at")
    vm.send(signal.SIGKILL)
    vm.wait(30)
    server.kill()
    check_flushed(vm.text, tmp_path / "disk.img")
