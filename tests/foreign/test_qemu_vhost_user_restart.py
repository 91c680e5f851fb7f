"""A server killed under the writes of a guest in QEMU and started again: what was in hand is done, once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.foreign.qemu import Linux
from tests.foreign.qemu_scripts import attached, written
from tests.foreign.qemu_serve import Serve

pytestmark = pytest.mark.guest

#: Blocks of 4 KiB.
BLOCKS, WRITERS, EACH, ROUNDS = 4096, 8, 16, 4
#: Each writer has blocks of its own, which it writes again and again, waiting for each write. A block that
#: shows an older round was not written, or again after the newer one.
SCRIPT = """
writer() {
    for round in $(seq %d); do
        for block in $(seq 0 15); do
            printf "writer $1 block $block round $round." > /tmp/block$1
            dd if=/tmp/block$1 of=/dev/vda bs=4k count=1 seek=$(($1 * 16 + block)) \\
                conv=sync oflag=direct 2>/tmp/error$1 || { cat /tmp/error$1; exit 1; }
        done
        echo "round $round" > /tmp/progress$1
    done
}
for n in 0 1 2 3 4 5 6 7; do writer $n & done
wait
cat /tmp/progress*
"""
#: For each writer another time: what it has in hand is overtaken by the writes of others. A queue that only
#: goes on where the last answer was would lose requests that way, and do others twice.
WRITE = """
sleep 0.0$(($4 / 65536 % 4 * 2))
dd of=$IMAGE seek=$4 conv=notrunc oflag=seek_bytes status=none
"""
READ = "dd if=$IMAGE skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An image behind an NBD server that answers out of order, at ``nbd`` beside it."""
    if shutil.which("nbdkit") is None:
        pytest.skip("there is no nbdkit (Debian: nbdkit)")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(BLOCKS * 4096))
    process = subprocess.Popen(
        [
            "nbdkit", "-f", "-U", str(tmp_path / "nbd"), "eval",
            "thread_model=echo parallel", f"get_size=echo {BLOCKS * 4096}",
            f"pread={READ}", f"pwrite={WRITE}", "can_write=exit 0", "can_flush=exit 0", "flush=exit 0",
        ],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "IMAGE": str(image)},
    )  # fmt: skip
    yield image
    process.kill()
    process.wait()


@pytest.mark.parametrize("rings", ["packed=off", "packed=on"])
def test_a_server_killed_three_times_under_writes_has_each_of_them_once(disk: Path, rings: str) -> None:
    """QEMU keeps the record of what is in hand (INFLIGHT_SHMFD), and connects again by itself."""
    vdev = f"""
[[vdev]]
type = "virtio-blk"
name = "disk0"
hostdev = "nbd+unix:///?socket={disk.parent / "nbd"}"
queues = 2
"""
    server = Serve(disk.parent, vdev, "vhost-user")
    guest = None
    try:
        guest = Linux(attached(server.socket("disk0"), f"num-queues=2,{rings}"), cpus=2)
        number = guest.begin(SCRIPT % ROUNDS)
        for _ in range(3):
            written(disk)
            server.kill()
            server.start()
        assert guest.end(number).splitlines() == [f"round {ROUNDS}"] * WRITERS
    finally:
        server.close()
        if guest is not None:
            guest.close()
    data = disk.read_bytes()
    for number in range(WRITERS * EACH):
        writer, block = divmod(number, EACH)
        expected = f"writer {writer} block {block} round {ROUNDS}."
        assert data[number * 4096 : (number + 1) * 4096].rstrip(b"\0").decode() == expected
    assert not any(data[WRITERS * EACH * 4096 :])
