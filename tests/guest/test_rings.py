"""Linux's rings on qvm: packed ones when offered, over MMIO and PCI, and what goes through them is whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvmcore.virtio import spec

Start = Callable[..., Any]
SBIN = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"}

#: Bit n of ``features`` is character n; then files are written, dropped from the cache and compared.
SCRIPT = r"""
for d in /sys/bus/virtio/devices/*; do
    echo "virtio $(cat $d/device) $(cat $d/features)"
done
mount -t ext4 /dev/vda /mnt || echo "no mount"
for n in 1 2 3 4; do
    head -c 3000000 /dev/urandom > /mnt/file$n
    sha256sum /mnt/file$n >> /sums
done
sync
echo 3 > /proc/sys/vm/drop_caches
sha256sum -c /sums
cat /mnt/file1 /mnt/file2 > /mnt/both
umount /mnt && echo "umounted"
"""


#: qvm without packed rings to offer.
SPLIT_ONLY = """
from qvmcore.cli import main
from qvmcore.virtio import life, spec
life.CORE_FEATURES &= ~(1 << spec.VIRTIO_F_RING_PACKED)
main()
"""


@pytest.mark.parametrize(
    ("place", "packed"),
    [('loc = 0x1c0d0000\nintr = "gic:41"\n', True), ("", True), ("", False)],
    ids=["mmio-packed", "pci-packed", "pci-split"],
)
def test_ext4_is_whole_on_every_ring(start: Start, tmp_path: Path, place: str, packed: bool) -> None:
    if shutil.which("mke2fs", path=SBIN["PATH"]) is None:
        pytest.skip("mke2fs is not installed (Debian: e2fsprogs)")
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(48 << 20))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", disk], check=True, env=SBIN)
    command = None if packed else [sys.executable, "-c", SPLIT_ONLY]
    vm = start(SCRIPT, vdevs=f'[[vdev]]\ntype = "virtio-blk"\nhostdev = "{disk}"\n{place}', command=command)
    assert vm.wait() == 0
    devices = re.findall(r"^virtio (0x\w+) ([01]+)$", vm.text, re.M)
    assert sorted(kind for kind, _ in devices) == ["0x0002", "0x0003"], vm.text
    for kind, bits in devices:
        assert bits[spec.VIRTIO_F_RING_PACKED] == str(int(packed)), f"device {kind}: {bits}"
    assert vm.text.count(": OK") == 4, vm.text
    assert "umounted" in vm.text
    done = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, env=SBIN)
    assert done.returncode == 0, done.stdout + done.stderr
