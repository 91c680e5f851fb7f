"""In-guest stress: nothing may be miscomputed, miscopied or lost, in either mode of the emulator.

Five boots in fast mode and one in safe mode; ``QVM_STRESS_BOOTS=10`` in the environment makes it ten
of each (safe mode takes a minute or two a boot)::

    QVM_STRESS_BOOTS=10 ./bootstrap test tests/guest/test_stress.py
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: Fork and pipe loops, a gzip round trip, sorts, and a write/read verify of a 64 MiB random disk.
SCRIPT = r"""
fail() { echo "stress: FAIL $1"; exit 1; }
i=0
while [ $i -lt 150 ]; do
    [ "$(echo $i | cat | sed 's/^/x/' | tr -d x)" = $i ] || fail pipe
    i=$((i + 1))
done
seq 1 20000 > /tmp/a
gzip -c /tmp/a | gunzip -c | cmp - /tmp/a || fail gzip
[ "$(sort -rn /tmp/a | sort -n | md5sum)" = "$(md5sum < /tmp/a)" ] || fail sort
echo "disk-md5: $(md5sum < /dev/vda)"
n=0
while [ $n -lt @ROUNDS@ ]; do
    dd if=/dev/urandom of=/tmp/r bs=4k count=64 2>/dev/null
    at=$(( (n * 7919) % 16000 ))
    dd if=/tmp/r of=/dev/vda bs=4k seek=$at count=64 conv=fsync 2>/dev/null
    echo 3 > /proc/sys/vm/drop_caches
    dd if=/dev/vda bs=4k skip=$at count=64 2>/dev/null | cmp - /tmp/r || fail verify
    echo "wrote: $at $(md5sum < /tmp/r)"
    n=$((n + 1))
done
echo "stress: ok"
"""

SIZE = 64 << 20


def random_disk(path: Path, seed: int) -> str:
    """A disk of random bytes; the MD5 the guest must read."""
    data = random.Random(seed).randbytes(SIZE)
    path.write_bytes(data)
    return hashlib.md5(data).hexdigest()


def check(text: str, disk: Path, wanted: str) -> None:
    """The guest's report, and what really is on the disk now."""
    assert "stress: ok" in text, text
    assert f"disk-md5: {wanted}" in text, text
    data = disk.read_bytes()
    last: dict[int, str] = {}
    for line in text.splitlines():
        if line.startswith("wrote: "):
            _, at, digest = line.split()[:3]
            last[int(at)] = digest
    assert last
    for at, digest in last.items():
        if not any(at < other < at + 64 or at - 64 < other < at for other in last):
            assert hashlib.md5(data[at * 4096 : (at + 64) * 4096]).hexdigest() == digest


BOOTS = int(os.environ.get("QVM_STRESS_BOOTS", "0"))
RUNS = [("fast", seed) for seed in range(BOOTS or 5)] + [("safe", 100 + seed) for seed in range(BOOTS or 1)]


@pytest.mark.parametrize(("mode", "seed"), RUNS)
def test_stress(start: Callable[..., Any], tmp_path: Path, mode: str, seed: int) -> None:
    disk = tmp_path / "disk.img"
    wanted = random_disk(disk, seed)
    vdevs = f'[[vdev]]\ntype = "virtio-blk"\nloc = 0x1c0d0000\nintr = "gic:41"\nhostdev = "{disk}"\n'
    vm = start(SCRIPT.replace("@ROUNDS@", "8"), vdevs=vdevs, mode=mode)
    assert vm.wait(280) == 0
    check(vm.text, disk, wanted)
