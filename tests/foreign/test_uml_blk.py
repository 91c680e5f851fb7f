"""Linux's virtio_blk in User Mode Linux on a disk of ours, and on one of qemu-storage-daemon.

What the other server does with the same guest, the same image and the same script is the oracle of
this folder: a test that fails for both is a fault of the test. The image is looked at on the host.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign import uml as linux
from tests.foreign.conftest import Serving
from tests.foreign.without import Without

SBIN = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"}
RING_PACKED = 34
DAEMON = "qemu-storage-daemon"
Disk = Callable[..., tuple[Serving, Path]]


def vdev(image: Path, **options: object) -> str:
    """The ``[[vdev]]`` table of a disk."""
    more = "".join(f"{key} = {value!r}\n".replace("True", "true") for key, value in options.items())
    return f'[[vdev]]\ntype = "virtio-blk"\nname = "disk0"\nhostdev = "{image}"\n{more}'


@pytest.fixture
def oracle(run_server: Callable[..., Serving], short: Path) -> Callable[..., Serving]:
    """``oracle(image)``: qemu-storage-daemon with one disk."""
    if shutil.which(DAEMON) is None:
        pytest.skip(f"no {DAEMON}: apt-get install qemu-system-common")

    def start(image: Path, **options: object) -> Serving:
        assert not options
        folder = short / "q"
        words = [
            DAEMON, "--blockdev", f"driver=file,node-name=f,discard=unmap,filename={image}",
            "--export", "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues=1,"
            f"addr.type=unix,addr.path={folder}/disk0.sock",
        ]  # fmt: skip
        return run_server(folder, words, ["disk0"])

    return start


@pytest.fixture(params=["packed", "split", "oracle"])
def disk(request: pytest.FixtureRequest, short: Path) -> Disk:
    """``disk(image, **options)``: a server with the image, and the socket to attach to."""

    def start(image: Path, **options: object) -> tuple[Serving, Path]:
        if request.param == "oracle":
            serving = request.getfixturevalue("oracle")(image, **options)
            return serving, serving.socket("disk0")
        serving = request.getfixturevalue("serve")(vdev(image, **options), "disk0")
        if request.param == "packed":
            return serving, serving.socket("disk0")
        without = Without(short / "split.sock", serving.socket("disk0"), RING_PACKED)
        request.addfinalizer(without.close)
        return serving, without.path

    return start


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """64 MiB without holes and without a pattern."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(64 << 20))
    return path


def fsck(image: Path, *, repair: bool = False) -> None:
    """The file system is clean; with ``repair`` it becomes so."""
    words = ["e2fsck", *(["-fp"] if repair else ["-fn"]), str(image)]
    done = subprocess.run(words, capture_output=True, text=True, env=SBIN)
    assert done.returncode in ((0, 1) if repair else (0,)), done.stdout + done.stderr


def files(image: Path, folder: Path) -> dict[str, str]:
    """Checksums of the files in an ext4 image, by name."""
    subprocess.run(
        ["debugfs", "-R", f"rdump / {folder}", str(image)], check=True, capture_output=True, env=SBIN
    )
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


FILES = """
mkfs.ext4 -q -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda
mkdir /run/m; mount /dev/vda /run/m
for n in 1 2 3 4 5 6 7 8; do head -c $((n * 700001)) /dev/urandom >/run/m/f$n; done
rm /run/m/f3; mv /run/m/f4 /run/m/g4
cd /run/m; sha256sum f* g* >/run/sums; cd /run
umount /run/m; echo 3 >/proc/sys/vm/drop_caches; mount /dev/vda /run/m
echo features $(cat /sys/block/vda/device/features)
cd /run/m; sha256sum -c --quiet /run/sums; cd /run
sed 's/^/sum /' sums
umount /run/m; e2fsck -fn /dev/vda
"""


def features(text: str) -> int:
    """The features the driver has accepted, from /sys."""
    bits = text.split("features ")[1].split()[0]
    return sum(1 << index for index, bit in enumerate(bits) if bit == "1")


def test_a_file_system_made_inside_is_clean_and_its_files_are_whole(
    request: pytest.FixtureRequest, disk: Disk, uml: Callable[..., linux.Uml], image: Path, tmp_path: Path
) -> None:
    serving, socket = disk(image)
    text = uml(FILES, [(socket, linux.BLK)], modules="virtio_blk").wait()
    packed = "[packed]" in request.node.name
    assert features(text) >> RING_PACKED & 1 == packed
    serving.stop()
    fsck(image)
    sums = {words[2]: words[1] for line in text.splitlines() if (words := line.split())[:1] == ["sum"]}
    assert len(sums) == 7
    assert files(image, tmp_path) | sums == files(image, tmp_path)


# ---- requests of every size ------------------------------------------------------------------------


def test_fio_finds_every_block_as_it_wrote_it(disk: Disk, uml: Callable[..., linux.Uml], image: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("no fio: apt-get install fio")
    chosen = random.Random(image.stat().st_size)
    jobs = []
    for number in range(4):
        depth, smallest = chosen.choice([1, 3, 8, 32, 64]), chosen.choice([512, 1024, 4096])
        largest = smallest * chosen.choice([1, 16, 61, 128])
        jobs.append(
            f"fio --name=v{number} --filename=/dev/vda --direct=1 --ioengine=libaio --rw=randrw "
            f"--verify=crc32c --verify_fatal=1 --do_verify=1 --iodepth={depth} "
            f"--bsrange={smallest}-{largest} --offset={number * 16}M --size=16M --io_size=6M "
            f"--randseed={number} --fallocate=none --eta=never "
            f"--iodepth_batch_submit={chosen.randint(1, depth)} --output=/run/fio.txt --output-format=terse "
            "|| { cat /run/fio.txt; false; }; echo verified $(cut -d';' -f6,47 /run/fio.txt)"
        )
    serving, socket = disk(image)
    text = uml("\n".join(jobs), [(socket, linux.BLK)], modules="virtio_blk").wait()
    assert text.count("\nverified ") == 4, text
    serving.stop()


def test_the_guest_reads_what_the_image_holds_and_gives_back_what_it_discards(
    disk: Disk, uml: Callable[..., linux.Uml], image: Path
) -> None:
    before, blocks = image.read_bytes(), image.stat().st_blocks
    assert blocks * 512 >= len(before)
    _, socket = disk(image)
    script = "md5sum </dev/vda; blkdiscard -o 16M -l 32M /dev/vda"
    text = uml(script, [(socket, linux.BLK)], modules="virtio_blk").wait()
    assert hashlib.md5(before).hexdigest() in text
    # In 512 bytes; the host's file system may need some more for a file that lies in many pieces.
    assert abs(blocks - (32 << 11) - image.stat().st_blocks) < 1024
    assert image.read_bytes() == before[: 16 << 20] + bytes(32 << 20) + before[48 << 20 :]


# ---- what only a qvm disk is asked -----------------------------------------------------------------

OURS = pytest.mark.parametrize("disk", ["packed"], indirect=True)
#: Where the kind of the rings plays no part.
BOTH = pytest.mark.parametrize("disk", ["packed", "oracle"], indirect=True)


@OURS
def test_serial_block_size_and_cache_of_the_vm_file(
    disk: Disk, uml: Callable[..., linux.Uml], image: Path
) -> None:
    script = "cd /sys/block/vda; echo $(cat serial) $(cat queue/logical_block_size queue/write_cache)"
    _, socket = disk(image, serial="DISK-0815", block_size=4096)
    text = uml(script, [(socket, linux.BLK)], modules="virtio_blk").wait()
    assert "\nDISK-0815 4096 write back\n" in text


@OURS
def test_a_read_only_disk_is_one_in_the_guest_too(
    disk: Disk, uml: Callable[..., linux.Uml], image: Path
) -> None:
    before = image.read_bytes()
    script = "blockdev --getro /dev/vda | sed s/^/ro=/; dd if=/dev/zero of=/dev/vda count=1 && false; true"
    _, socket = disk(image, readonly=True)
    text = uml(script, [(socket, linux.BLK)], modules="virtio_blk").wait()
    assert "\nro=1\n" in text
    assert image.read_bytes() == before


@OURS
def test_every_fsync_is_a_flush(disk: Disk, uml: Callable[..., linux.Uml], image: Path) -> None:
    script = """
    for n in 1 2 3 4 5; do dd if=/dev/zero of=/dev/vda bs=64k count=1 seek=$n conv=notrunc,fsync; done
    echo ready; read go
    """
    serving, socket = disk(image)
    guest = uml(script, [(socket, linux.BLK)], modules="virtio_blk")
    guest.expect("^ready$")
    status = serving.status("disk0")
    guest.type("go")
    guest.wait()
    assert status["flushes"] >= 5 and status["bytes_written"] == 5 << 16


@OURS
def test_a_resize_is_noticed_by_a_message_on_the_back_end_channel(
    disk: Disk, uml: Callable[..., linux.Uml], image: Path
) -> None:
    script = """
    echo ready; n=0
    size() { blockdev --getsize64 /dev/vda; }
    while [ $(size) = $((64 << 20)) ]; do n=$((n + 1)); [ $n -lt 600 ]; sleep 0.1; done
    echo size=$(size)
    printf behind | dd of=/dev/vda bs=1M seek=95 conv=fsync
    """
    serving, socket = disk(image)
    guest = uml(script, [(socket, linux.BLK)], modules="virtio_blk")
    guest.expect("^ready$")
    os.truncate(image, 96 << 20)
    assert f"\nsize={96 << 20}\n" in guest.wait()
    serving.stop()
    assert image.read_bytes()[95 << 20 :].startswith(b"behind\0")


# ---- clients that go -------------------------------------------------------------------------------

#: Numbered files, named only after they are safe.
WRITER = r"""
mount /dev/vda /mnt
n=0
while n=$((n + 1)); do
    head -c 300000 /dev/zero | tr '\0' "\\$((100 + n % 8))" >/mnt/f$n
    sync -f /mnt/f$n; echo safe $n
done
"""
READER = """
e2fsck -fp /dev/vda || [ $? = 1 ]
mount /dev/vda /mnt
for f in /mnt/f*; do echo sum $(md5sum <$f | cut -c1-32) ${f#/mnt/f}; done
umount /mnt
"""


def test_after_kill_9_in_mid_write_the_next_guest_has_all_that_was_safe(
    disk: Disk, uml: Callable[..., linux.Uml], image: Path
) -> None:
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-F", image], check=True, env=SBIN)
    serving, socket = disk(image)
    writer = uml(WRITER, [(socket, linux.BLK)], modules="virtio_blk")
    writer.expect("^safe 12$")
    writer.kill()
    last = int(writer.text.split("safe ")[-1].split()[0])
    text = uml(READER, [(socket, linux.BLK)], modules="virtio_blk").wait()
    read = {words[2]: words[1] for line in text.splitlines() if (words := line.split())[:1] == ["sum"]}
    for number in range(1, last + 1):
        wanted = hashlib.md5(bytes([int(str(100 + number % 8), 8)]) * 300000).hexdigest()
        assert read[str(number)] == wanted, f"file {number} of {last}"
    serving.stop()
    fsck(image)


@BOTH
def test_a_reboot_of_the_guest_is_a_client_that_comes_back(
    disk: Disk, uml: Callable[..., linux.Uml], image: Path
) -> None:
    script = """
    [ -b /dev/vda ]
    if [ "$(head -c 6 /dev/vda)" != before ]; then
        printf before | dd of=/dev/vda conv=fsync
        inside restart
    fi
    echo again
    """
    serving, socket = disk(image)
    text = uml(script, [(socket, linux.BLK)], modules="virtio_blk").wait()
    assert text.count("\nagain\n") == 1
    serving.stop()
    assert image.read_bytes()[:6] == b"before"


@BOTH
def test_a_guest_whose_server_is_killed_loses_the_disk_and_lives(
    disk: Disk, uml: Callable[..., linux.Uml], image: Path
) -> None:
    script = """
    md5sum </dev/vda; echo ready
    while [ -e /dev/vda ]; do sleep 0.1; done; echo gone
    """
    serving, socket = disk(image)
    guest = uml(script, [(socket, linux.BLK)], modules="virtio_blk")
    guest.expect("^ready$")
    serving.process.kill()
    serving.process.wait()
    guest.expect("^gone$")
    guest.wait()
