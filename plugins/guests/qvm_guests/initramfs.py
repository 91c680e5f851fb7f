"""The root file system of a guest: busybox, the modules it needs, and the scripts in ``data/``."""

from __future__ import annotations

import gzip
from importlib import resources

from qvm_guests import cpio
from qvm_guests.modules import Closure, dependency_tables

#: (path in the guest, file in data/, executable)
_SCRIPTS = (
    ("init", "init", True),
    ("etc/fstab", "fstab", False),
    ("etc/shrc", "shrc", False),
    ("etc/acpi/PWRF/00000080", "power-button", True),
    ("usr/lib/qvm/button", "button", True),
    ("usr/lib/qvm/selfcheck", "selfcheck", True),
)
_DIRECTORIES = ("dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "usr/bin", "usr/sbin", "var/log")


def entries(busybox: bytes, release: str, closure: Closure) -> list[cpio.Entry]:
    """Everything in the archive. The other commands of busybox are linked by /init, which can ask it."""
    data = resources.files("qvm_guests").joinpath("data")
    modules = f"lib/modules/{release}"
    return [
        *(cpio.directory(name) for name in _DIRECTORIES),
        cpio.directory("tmp", 0o1777),
        # The kernel opens the first; /init needs the second before devtmpfs is there.
        cpio.char_device("dev/console", 5, 1),
        cpio.char_device("dev/null", 1, 3),
        cpio.file("bin/busybox", busybox, executable=True),
        cpio.symlink("bin/sh", "busybox"),
        *(
            cpio.file(path, data.joinpath(name).read_bytes(), executable=executable)
            for path, name, executable in _SCRIPTS
        ),
        *(cpio.file(f"{modules}/{module.path}", module.data) for module in closure.modules),
        *(cpio.file(f"{modules}/{n}", text.encode()) for n, text in dependency_tables(closure).items()),
    ]


def build(busybox: bytes, release: str, closure: Closure) -> bytes:
    """The compressed archive; the same input gives the same bytes."""
    return gzip.compress(cpio.archive(entries(busybox, release, closure)), compresslevel=9, mtime=0)
