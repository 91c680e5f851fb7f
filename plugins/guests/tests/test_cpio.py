"""The archive the kernel unpacks."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest
from qvm_guests import cpio, initramfs
from qvm_guests.debs import DebArchive
from qvm_guests.modules import ModuleTree


def parse(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """A reader of its own: name -> (mode, content, device)."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    position = 0
    while True:
        head = data[position : position + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        assert fields[2:4] == [0, 0], "owner is root"
        assert fields[5] == 0, "the time is 0"
        name = data[position + 110 : position + 110 + fields[11] - 1].decode()
        position = (position + 110 + fields[11] + 3) & ~3
        content = data[position : position + fields[6]]
        position = (position + fields[6] + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], content, (fields[9], fields[10]))


ENTRIES = [
    cpio.file("usr/lib/z", b"12345", executable=True),
    cpio.file("a", b""),
    cpio.symlink("bin/sh", "busybox"),
    cpio.char_device("dev/console", 5, 1),
    cpio.directory("tmp", 0o1777),
]


def test_round_trip() -> None:
    found = parse(cpio.archive(ENTRIES))
    assert found["usr/lib/z"] == (0o100755, b"12345", (0, 0))
    assert found["a"] == (0o100644, b"", (0, 0))
    assert found["bin/sh"] == (0o120777, b"busybox", (0, 0))
    assert found["dev/console"] == (0o020600, b"", (5, 1))
    assert found["tmp"][0] == 0o041777


def test_parents_come_before_children_and_order_is_fixed() -> None:
    names = list(parse(cpio.archive(ENTRIES)))
    assert names == sorted(names)
    assert {"usr", "usr/lib", "bin", "dev"} <= set(names)
    assert cpio.archive(ENTRIES) == cpio.archive(reversed(ENTRIES))


def test_cpio_reads_it(tmp_path: Path) -> None:
    tool = [shutil.which("cpio") or "", "-it", "--quiet"]
    if not tool[0]:
        busybox = shutil.which("busybox")
        if busybox is None:
            pytest.skip("this machine has neither cpio nor busybox")
        tool = [busybox, "cpio", "-t"]
    done = subprocess.run(tool, input=cpio.archive(ENTRIES), capture_output=True, check=True)
    assert done.stdout.decode().split() == list(parse(cpio.archive(ENTRIES)))


def test_initramfs_is_complete_and_repeatable(kernel_deb: Path) -> None:
    with DebArchive(kernel_deb) as deb:
        tree = ModuleTree.of(deb)
        closure = tree.closure(["virtio_blk", "ext4"])
    image = initramfs.build(b"busybox", tree.release, closure)
    assert image == initramfs.build(b"busybox", tree.release, closure)
    found = parse(gzip.decompress(image))
    assert found["init"][0] & 0o111
    assert found["init"][1].startswith(b"#!/bin/sh\n")
    base = f"lib/modules/{tree.release}"
    assert found[f"{base}/modules.builtin"][1] == b"kernel/ext4.ko\n"
    assert f"{base}/kernel/drivers/virtio_blk.ko" in found
    assert found["dev/null"][2] == (1, 3)
