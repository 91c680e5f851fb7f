"""QEMU's vhost-user client with Linux's block driver on our disk, from mount to a server that is killed."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.foreign.qemu import LIMIT, Linux
from tests.foreign.qemu_scripts import DISK_SIZE, KNOWN, ext4, in_the_image, known_sum, sound, write_and_flush
from tests.foreign.qemu_serve import Serve

pytestmark = pytest.mark.guest

DISK = """
[[vdev]]
type = "virtio-blk"
name = "disk0"
hostdev = "disk.img"
queues = 2
"""


def attached(socket: Path, options: str = "num-queues=2") -> list[str]:
    """QEMU's options for the disk."""
    return [
        "-chardev", f"socket,id=disk,path={socket},reconnect=1",
        "-device", f"vhost-user-blk-pci,chardev=disk,{options}",
    ]  # fmt: skip


def written(image: Path) -> None:
    """Wait until the server has written to the image."""
    before, deadline = image.stat().st_mtime_ns, time.monotonic() + LIMIT
    while image.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "no write came"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ext4(tmp_path_factory.mktemp("vhost-user-blk"))


@pytest.fixture(scope="module")
def server(image: Path) -> Iterator[Serve]:
    serve = Serve(image.parent, DISK, "vhost-user")
    yield serve
    serve.close()


@pytest.fixture(scope="module")
def linux(server: Serve) -> Iterator[Linux]:
    guest = Linux(attached(server.socket("disk0")), cpus=2)
    guest.run("mount -t ext4 /dev/vda /mnt")
    yield guest
    guest.close()


def test_linux_mounts_the_disk_and_reads_a_file_right(linux: Linux) -> None:
    known_sum(linux)
    assert int(linux.run("cat /sys/block/vda/size")) * 512 == DISK_SIZE


def test_what_linux_has_flushed_is_in_the_image(linux: Linux, image: Path) -> None:
    write_and_flush(linux, image)


def test_both_queues_carry_requests(linux: Linux) -> None:
    said = linux.run("""
        for cpu in 0 1; do
            taskset $((cpu + 1)) dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>&-
        done
        ls /sys/block/vda/mq; grep -e req /proc/interrupts
    """)
    counts = re.findall(r"^ *\d+: +(\d+) +(\d+) .* virtio\d+-req\.(\d)$", said, re.MULTILINE)
    assert [queue for *_, queue in counts] == ["0", "1"], said
    assert all(int(first) + int(second) > 0 for first, second, _ in counts), said


def test_a_vm_stopped_and_continued_under_load_loses_nothing(linux: Linux, image: Path) -> None:
    number = linux.begin("""
        for n in 1 2 3 4; do
            (cat /mnt/known /mnt/known > /mnt/copy$n; sync) &
        done
        wait
        echo 3 > /proc/sys/vm/drop_caches
        for n in 1 2 3 4; do sha256sum /mnt/copy$n; rm /mnt/copy$n; done
    """)
    for _ in range(5):
        written(image)
        linux.qmp("stop")
        assert linux.qmp("query-status")["status"] == "paused"
        linux.qmp("cont")
    said = linux.end(number)
    assert said.count(hashlib.sha256(KNOWN + KNOWN).hexdigest()) == 4, said


def test_the_guest_reboots_on_the_same_connection_and_mounts_again(linux: Linux) -> None:
    linux.run("umount /mnt")
    linux.restart()
    linux.run("mount -t ext4 /dev/vda /mnt")
    known_sum(linux)


#: Four writers; each has 16 blocks of 4 KiB, which it writes again and again, waiting for each write. A
#: block that shows an older round was written twice, or not at all.
WRITERS = """
writer() {
    for round in $(seq %(rounds)d); do
        for block in $(seq 0 15); do
            printf "writer $1 block $block round $round." > /tmp/block$1
            dd if=/tmp/block$1 of=/dev/vda bs=4k count=1 seek=$((%(start)d + $1 * 16 + block)) \
                conv=sync oflag=direct 2>/tmp/error$1 || { cat /tmp/error$1; exit 1; }
        done
        echo "round $round" > /tmp/progress$1
    done
}
for n in 0 1 2 3; do writer $n & done
wait
cat /tmp/progress*
"""
ROUNDS, START = 12, DISK_SIZE // 4096 - 64


@pytest.mark.parametrize("rings", ["packed=off", "packed=on"])
def test_a_server_killed_under_writes_and_started_again_has_every_write_once(
    tmp_path: Path, rings: str
) -> None:
    """SIGKILL three times while four writers wait for their blocks; QEMU reconnects by itself."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(DISK_SIZE))
    server = Serve(tmp_path, DISK, "vhost-user")
    guest = None
    try:
        guest = Linux(attached(server.socket("disk0"), f"num-queues=2,{rings}"), cpus=2)
        number = guest.begin(WRITERS % {"rounds": ROUNDS, "start": START})
        for _ in range(3):
            written(disk)
            server.kill()
            server.start()
        said = guest.end(number)
        assert said.splitlines() == [f"round {ROUNDS}"] * 4
        data = disk.read_bytes()
        for block in range(64):
            place = (START + block) * 4096
            expected = f"writer {block // 16} block {block % 16} round {ROUNDS}.".encode()
            assert data[place : place + 4096].rstrip(b"\0") == expected
        assert not any(data[: START * 4096])
    finally:
        server.close()
        if guest is not None:
            guest.close()


def test_packed_rings_carry_a_file_system_too(server: Serve, image: Path, linux: Linux) -> None:
    """The next client of the same socket, with VIRTIO_F_RING_PACKED."""
    linux.run("sync; umount /mnt")
    linux.close()
    packed = Linux(attached(server.socket("disk0"), "num-queues=2,packed=on"), cpus=2)
    try:
        features = packed.run("cat /sys/bus/virtio/devices/virtio0/features")
        assert features[34] == "1", features  # VIRTIO_F_RING_PACKED
        packed.run("mount -t ext4 /dev/vda /mnt")
        known_sum(packed)
        said = packed.run("cat /mnt/known /mnt/known > /mnt/packed; sync; sha256sum /mnt/packed; umount /mnt")
        assert said.split()[0] == hashlib.sha256(KNOWN + KNOWN).hexdigest()
    finally:
        packed.close()
    sound(image)
    assert in_the_image(image, "packed") == KNOWN + KNOWN
