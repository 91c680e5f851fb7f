"""QEMU of a later Debian release, which speaks vfio-user, in a folder of its own.

Nothing is installed on this machine: apt works on a state of its own with the mirror of the machine's own
sources, and QEMU runs on the libraries unpacked beside it. The packages and the folder are kept in qvm's
cache; the folder gets its name when it is complete, so an interrupted run leaves nothing that looks done.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from qvm_guests import atomic
from qvm_guests.cache import GuestCache, Package
from qvm_guests.progress import Progress

from qvmcore.api import HostError
from tests.rig import image, packages

#: The release QEMU comes from, and the suite of it that is asked first.
RELEASE, NEWER = "trixie", "trixie-backports"
PACKAGE = "qemu-system-x86"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True, slots=True)
class Qemu11:
    """QEMU in a folder: ``command`` starts it, with ``environment`` added to that of the caller."""

    command: tuple[str, ...]
    environment: dict[str, str]


@functools.cache
def obtained() -> Qemu11:
    """QEMU 11; where it cannot be had the test is skipped, with the reason."""
    try:
        return obtain()
    except HostError as error:
        pytest.skip(f"no QEMU 11: {error}")


class NewerApt(packages.ClosureApt):
    """The private apt with packages of ``NEWER`` before those of ``RELEASE``."""

    def _configuration(self) -> str:
        return super()._configuration() + f'APT::Default-Release "{NEWER}";\n'


def obtain() -> Qemu11:
    """QEMU ready to start, from the network only what is missing. Raises HostError with the reason."""
    if platform.machine() != "x86_64":
        raise HostError(f"the packages of QEMU are for x86_64, this machine is {platform.machine()}")
    progress = Progress()
    cache = GuestCache("qemu-11")
    with cache.locked(progress.note) as lock, atomic.host_errors("use the cache", cache.root):
        found = cache.verified(progress.note) or _fetch(cache, progress, lock)
        sysroot = cache.root / f"sysroot-{image.key(found)}"
        if not sysroot.is_dir():
            _unpack(cache, found, sysroot, progress)
    return _started_from(sysroot)


def _fetch(cache: GuestCache, progress: Progress, lock: int) -> list[Package]:
    """Ask apt on this machine's mirror what QEMU needs, and get it."""
    apt = NewerApt(cache.apt, "amd64", progress, lock)
    apt.prepare()
    sources = cache.root / f"{RELEASE}.list"
    suites = (f"deb {apt.mirror(RELEASE)} {suite} main\n" for suite in (RELEASE, NEWER))
    atomic.write(sources, "".join(suites).encode())
    apt.prepare(sources)
    apt.update(must=True)
    found = apt.download(apt.closure([PACKAGE]), cache.debs)
    cache.commit(found)
    return found


def _unpack(cache: GuestCache, found: list[Package], sysroot: Path, progress: Progress) -> None:
    progress.step(f"unpacking {len(found)} packages of QEMU")
    for old in (*cache.root.glob("sysroot-*"), *cache.root.glob("unpacking-*")):
        shutil.rmtree(old)
    tree = Path(tempfile.mkdtemp(dir=cache.root, prefix="unpacking-"))
    try:
        image.unpack(tree, [cache.path(package) for package in found])
        tree.rename(sysroot)
    except BaseException:
        shutil.rmtree(tree)
        raise


def _started_from(sysroot: Path) -> Qemu11:
    """How to start the QEMU in ``sysroot``; it is started once, to see that it has vfio-user."""
    qemu = Qemu11(
        (
            str(sysroot / "usr/lib64/ld-linux-x86-64.so.2"),
            *("--library-path", str(sysroot / _LIBRARIES)),
            *("--argv0", "qemu-system-x86_64"),
            str(sysroot / "usr/bin/qemu-system-x86_64"),
            *("-L", str(sysroot / "usr/share/qemu"), "-L", str(sysroot / "usr/share/seabios")),
        ),
        {"QEMU_MODULE_DIR": str(sysroot / _LIBRARIES / "qemu")},
    )
    asked = subprocess.run(
        [*qemu.command, "-device", "vfio-user-pci,help"],
        env={**os.environ, **qemu.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode or not re.search(r"^\s+socket=", asked.stdout, re.MULTILINE):
        raise HostError(
            f"QEMU in {sysroot} has no vfio-user: {(asked.stderr or asked.stdout).strip()[-300:]}"
        )
    return qemu
