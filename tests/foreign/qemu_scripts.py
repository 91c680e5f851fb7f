"""What Linux in QEMU is told to do with its disks and cards, whichever way they came to it."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from pathlib import Path

from tests.foreign.qemu import LIMIT, Linux
from tests.rig.image import SBIN

DISK_SIZE = 128 << 20
KNOWN = random.Random(7).randbytes(6 << 20)

#: Two cards on one cable, so that one guest has both of its ends.
CARDS = """
[[vdev]]
type = "virtio-net"
name = "left"
peer = "./cable"
mac = "02:00:00:00:00:01"

[[vdev]]
type = "virtio-net"
name = "right"
peer = "./cable"
mac = "02:00:00:00:00:02"
"""
#: The right card goes to another network name space: without, packets would take a short cut.
TWO_HOSTS = """
right=$(grep -l 02:00:00:00:00:02 /sys/class/net/*/address | cut -d/ -f5)
left=$(grep -l 02:00:00:00:00:01 /sys/class/net/*/address | cut -d/ -f5)
unshare -n sh -c 'echo $$ > /tmp/right; exec sleep 100000' > /dev/null 2>&1 &
until [ -s /tmp/right ]; do sleep 0.05; done
there="nsenter -n -t $(cat /tmp/right)"
ip link set $right netns $(cat /tmp/right)
$there ip addr add 10.0.0.2/24 dev $right
$there ip link set $right up
ip addr add 10.0.0.1/24 dev $left
ip link set $left up
until ping -c 1 -W 1 10.0.0.2 > /dev/null; do sleep 0.1; done
"""
#: Four megabytes from the right card's side by TCP.
COPY = """
head -c 4000000 /dev/urandom > /tmp/file
mkfifo /tmp/quiet
nsenter -n -t $(cat /tmp/right) nc -l -p 9000 -e cat /tmp/file &
until nc 10.0.0.2 9000 <>/tmp/quiet > /tmp/copy 2>&-; do sleep 0.1; done
sha256sum /tmp/file /tmp/copy
rm /tmp/file /tmp/copy /tmp/quiet
"""


def attached(socket: Path, options: str = "num-queues=2") -> list[str]:
    """QEMU's options for a vhost-user disk; it connects again when the server has gone."""
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


def ping(guest: Linux, count: int = 5) -> None:
    """The cards reach each other, and every answer comes."""
    said = guest.run(f"ping -c {count} -i 0.05 -s 1400 10.0.0.2")
    assert f"{count} packets transmitted, {count} packets received, 0% packet loss" in said


def copy(guest: Linux) -> None:
    """A file comes through unharmed."""
    sent, received = (line.split()[0] for line in guest.run(COPY).splitlines())
    assert sent == received != hashlib.sha256(b"").hexdigest()


def ext4(folder: Path) -> Path:
    """``disk.img`` with a file system that holds ``known``."""
    image, tree = folder / "disk.img", folder / "tree"
    tree.mkdir()
    (tree / "known").write_bytes(KNOWN)
    image.write_bytes(b"")
    os.truncate(image, DISK_SIZE)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(image)], check=True, env=SBIN)
    return image


def known_sum(guest: Linux) -> None:
    """The file that was there from the start reads right, from the disk and not from a cache."""
    said = guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum /mnt/known")
    assert said.split()[0] == hashlib.sha256(KNOWN).hexdigest()


def write_and_flush(guest: Linux, image: Path) -> None:
    """A file Linux has flushed is in the image."""
    said = guest.run("""
        head -c 3000000 /dev/urandom > /mnt/written
        sync
        sha256sum /mnt/written
        cat /sys/block/vda/queue/write_cache
    """)
    assert "write back" in said
    assert hashlib.sha256(in_the_image(image, "written")).hexdigest() == said.split()[0]


def in_the_image(image: Path, name: str) -> bytes:
    """A file of the image, read on the host."""
    command = ["debugfs", "-R", f"cat /{name}", str(image)]
    return subprocess.run(command, capture_output=True, env=SBIN, check=True).stdout


def sound(image: Path) -> None:
    """e2fsck finds nothing to repair: the journal replayed first, as on any dirty mount."""
    subprocess.run(["e2fsck", "-p", str(image)], capture_output=True, env=SBIN, check=False)
    command = ["e2fsck", "-fn", str(image)]
    checked = subprocess.run(command, capture_output=True, text=True, env=SBIN, check=False)
    assert checked.returncode == 0, checked.stdout
