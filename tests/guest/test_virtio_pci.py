"""Linux's virtio-pci driver in front of our transport: MSI-X, INTx, resets, both transports in one VM."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_guests import disk as ext4

from tests.guest.conftest import ROOT, guest_folder

Start = Callable[..., Any]
FILE_SIZE = 3 << 20

#: Writes a file to the disk's file system, and checks what was there before.
FILESYSTEM = """
mount -t ext4 /dev/vda /mnt || echo no-mount
echo "before: $(md5sum < /mnt/before)"
dd if=/dev/urandom of=/mnt/after bs=64k count=48 2>/dev/null
sum=$(md5sum < /mnt/after)
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /mnt
[ "$sum" = "$(md5sum < /mnt/after)" ] && echo "after: $sum"
umount /mnt
"""


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, str]:
    """An ext4 image with the file ``before``, and the MD5 of that."""
    if shutil.which("mke2fs", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])) is None:
        pytest.skip("no mke2fs; the package e2fsprogs has it")
    data = random.Random(4).randbytes(FILE_SIZE)
    (tmp_path / "before").write_bytes(data)
    path = tmp_path / "ext4.img"
    ext4.make(path, 32 << 20, {"before": tmp_path / "before"})
    return path, hashlib.md5(data).hexdigest()


@pytest.fixture
def console_on_pci(files: Path) -> None:
    """The machine of the other tests with its console on PCI: without loc, that is all."""
    text = (files / "vm.toml").read_text()
    (files / "vm.toml").write_text(re.sub(r"^(loc|intr) = .*\n", "", text, flags=re.MULTILINE))


def blk(path: Path, place: str = "") -> str:
    return f'[[vdev]]\ntype = "virtio-blk"\nname = "disk0"\nhostdev = "{path}"\n{place}\n'


MMIO = 'loc = 0x1c0d0000\nintr = "gic:41"'


def check_filesystem(path: Path) -> None:
    """fsck finds nothing to mend."""
    tool = shutil.which("e2fsck", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
    assert tool is not None
    done = subprocess.run([tool, "-fn", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def interrupts(text: str, name: str) -> list[int]:
    """The counts /proc/interrupts shows for an action, one for each time it was printed."""
    return [int(count) for count in re.findall(rf"^ *\d+: +(\d+) .* {re.escape(name)}$", text, re.MULTILINE)]


@pytest.mark.usefixtures("console_on_pci")
def test_4_1_disk_and_console_on_pci(start: Start, image: tuple[Path, str]) -> None:
    """An ext4 file system by message interrupts, and the identities a guest sees."""
    path, before = image
    vm = start(
        "cat /proc/interrupts" + FILESYSTEM + "cat /proc/interrupts\n"
        "for d in /sys/bus/pci/devices/*; do cd $d; echo pci: ${d##*/} "
        "$(cat vendor device class subsystem_vendor subsystem_device revision); done",
        vdevs=blk(path),
    )
    assert vm.wait() == 0
    assert f"before: {before}" in vm.text
    assert "after: " in vm.text
    found = {tuple(line.split()[2:]) for line in vm.text.splitlines() if line.startswith("pci: ")}
    assert ("0x1af4", "0x1042", "0x018000", "0x1c05", "0x0042", "0x01") in found
    assert ("0x1af4", "0x1043", "0x078000", "0x1c05", "0x0043", "0x01") in found
    disk = max(interrupts(vm.text, "virtio1-req.0"), interrupts(vm.text, "virtio0-req.0"))
    assert re.search(r"MSI \d+ Edge +virtio\d-req\.0", vm.text)
    assert disk[1] > disk[0] > 0
    assert re.search(r"MSI \d+ Edge +virtio\d-(config|input|output)", vm.text)
    assert "ended: guest-shutdown" in vm.text
    check_filesystem(path)


@pytest.mark.parametrize("on_pci", ["disk", "console"])
def test_4_1_and_4_2_in_one_machine(
    start: Start, files: Path, image: tuple[Path, str], request: pytest.FixtureRequest, on_pci: str
) -> None:
    """One device by direct mapping, the other on PCI, and the reverse."""
    path, before = image
    if on_pci == "console":
        request.getfixturevalue("console_on_pci")
    vm = start(
        FILESYSTEM + "cat /proc/interrupts; readlink -f /sys/class/block/vda/device",
        vdevs=blk(path, MMIO if on_pci == "console" else 'loc = "pci:0:9"'),
    )
    assert vm.wait() == 0
    assert f"before: {before}" in vm.text
    assert "after: " in vm.text
    if on_pci == "disk":
        assert "/0000:00:09.0/virtio" in vm.text
        assert re.search(r"MSI \d+ Edge +virtio\d-req\.0", vm.text)
    else:
        assert re.search(r"/platform/1c0d0000\.\w+/virtio", vm.text)
        assert re.search(r"MSI \d+ Edge +virtio\d-output", vm.text)
    check_filesystem(path)


@pytest.mark.usefixtures("console_on_pci")
def test_4_1_4_5_intx(start: Start, image: tuple[Path, str]) -> None:
    """A kernel without message interrupts: level lines and the ISR status."""
    path, before = image
    vm = start(FILESYSTEM + "cat /proc/interrupts", vdevs=blk(path), cmdline="pci=nomsi")
    assert vm.wait() == 0
    assert f"before: {before}" in vm.text
    assert "after: " in vm.text
    assert "MSI" not in vm.text
    assert re.search(r"GIC-0 +\d+ Level +virtio\d", vm.text)
    check_filesystem(path)


@pytest.mark.usefixtures("console_on_pci")
def test_2_4_the_driver_leaves_and_comes_back(start: Start, image: tuple[Path, str]) -> None:
    """Unbind and bind: a reset under the driver. Remove and rescan: the BARs are placed again."""
    path, before = image
    vm = start(
        """
        check() { echo "$1: $(dd if=/dev/vda bs=1M 2>/dev/null | md5sum)"; }
        at=$(basename $(readlink -f /sys/class/block/vda/device/..))
        check first
        for n in 1 2 3; do
            echo $at > /sys/bus/pci/drivers/virtio-pci/unbind
            [ -e /dev/vda ] && echo still there
            echo $at > /sys/bus/pci/drivers/virtio-pci/bind
            check again
        done
        echo 1 > /sys/bus/pci/devices/$at/remove
        [ -e /dev/vda ] && echo still there
        echo 1 > /sys/bus/pci/rescan
        check rescan
        """
        + FILESYSTEM,
        vdevs=blk(path),
    )
    whole = hashlib.md5(path.read_bytes()).hexdigest()
    assert vm.wait() == 0
    assert vm.text.count(f"again: {whole}") == 3
    assert f"first: {whole}" in vm.text
    assert f"rescan: {whole}" in vm.text
    assert "still there" not in vm.text
    assert f"before: {before}" in vm.text
    assert "after: " in vm.text


@pytest.mark.usefixtures("console_on_pci")
def test_the_power_is_cut_while_the_disk_works(start: Start, tmp_path: Path) -> None:
    """SIGQUIT in the middle: every step of the end succeeds, the image can be opened at once."""
    path = tmp_path / "busy.img"
    path.write_bytes(bytes(16 << 20))
    write = "dd if=/dev/zero of=/dev/vda bs=64k count=200 2>/dev/null"
    vm = start(f"while :; do {write}; echo pass; done", vdevs=blk(path))
    vm.expect("pass")
    vm.send(signal.SIGQUIT)
    assert vm.wait(60) == 3
    assert "ended: sigquit" in vm.text
    assert "Traceback" not in vm.text
    assert path.stat().st_size == 16 << 20


@pytest.mark.parametrize("name", ["linux-arm64-pci", "linux-arm64-mixed"])
def test_the_example_boots(start: Start, files: Path, tmp_path: Path, name: str) -> None:
    """As it is, but for the guest's place and the disk."""
    path = tmp_path / "example.img"
    path.write_bytes(bytes(8 << 20))
    guest = guest_folder()
    shutil.copy(ROOT / "examples" / f"{name}.toml", files / "vm.toml")
    vm = start(
        "echo hello > /dev/vda; sync; readlink -f /sys/class/block/vda/device",
        args=[
            *("--set", f"load.kernel={guest / 'vmlinuz'}"),
            *("--set", f"load.initrd={guest / 'initramfs.cpio.gz'}"),
            *("--set", f"vdev.disk0.hostdev={path}"),
        ],
    )
    assert vm.wait() == 0
    assert "/0000:00:0" in vm.text
    assert path.read_bytes().startswith(b"hello\n")
