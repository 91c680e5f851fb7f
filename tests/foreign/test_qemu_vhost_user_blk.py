"""QEMU's vhost-user client with Linux's block driver on our disk, from mount to reboot."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.foreign.qemu import Linux
from tests.foreign.qemu_scripts import (
    DISK_SIZE,
    KNOWN,
    attached,
    ext4,
    in_the_image,
    known_sum,
    sound,
    write_and_flush,
    written,
)
from tests.foreign.qemu_serve import Serve

pytestmark = pytest.mark.guest

DISK = """
[[vdev]]
type = "virtio-blk"
name = "disk0"
hostdev = "disk.img"
queues = 2
"""


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
