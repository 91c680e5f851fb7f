"""The root file system of the rig's machine: an ext4 image of Debian packages, built once and cached.

No root, no chroot and no maintainer script: packages are unpacked in a folder, and mke2fs copies the
folder into an image. What the scripts of a package would have done and the rig needs is done here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qvm_guests import atomic
from qvm_guests.cache import GuestCache, Package
from qvm_guests.progress import Progress

from qvmcore.api import HostError
from tests.rig import packages as debian

#: What runs in the machine: the code under test, the disk tests in its guest, the boot to compare with.
PACKAGES = ("busybox-static", "e2fsprogs", "fio", "python3", "qemu-system-x86")
#: Empty folders to mount on.
FOLDERS = ("code", "dev", "proc", "root", "run", "sys", "tmp", "mnt")
_MERGED = ("bin", "sbin", "lib", "lib64")
_SPARE = 16 << 20
SBIN = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"}


def key(found: Sequence[Package]) -> str:
    """What the image is made of, as a short text: another recipe or another package is another image."""
    recipe = hashlib.sha256(Path(__file__).read_bytes())
    for package in sorted(found, key=lambda package: package.name):
        recipe.update(f"{package.name} {package.version} {package.sha256}\n".encode())
    return recipe.hexdigest()[:16]


def python_version(found: Sequence[Package]) -> tuple[int, int]:
    """The Python in the image, for example (3, 11)."""
    for package in found:
        if package.name == "python3":
            major, minor = package.version.split(".")[:2]
            return int(major), int(minor)
    raise HostError("the rig's packages have no python3", hint="remove the folder rig in qvm's cache")


def build(progress: Progress) -> tuple[Path, tuple[int, int]]:
    """The image and the version of the Python in it. Raises HostError when there is no way to get it."""
    cache = GuestCache("rig")
    with cache.locked(progress.note) as lock:
        found = debian.obtain(cache, PACKAGES, progress, lock)
        image = cache.root / f"root-{key(found)}.img"
        if not image.exists():
            progress.step(f"building {image.name} of {len(found)} packages")
            with tempfile.TemporaryDirectory(dir=cache.root, prefix="tree-") as tree:
                unpack(Path(tree), [cache.path(package) for package in found])
                compile_all(Path(tree), python_version(found))
                make(image, Path(tree))
            for old in cache.root.glob("root-*.img"):
                if old != image:
                    old.unlink()
    return image, python_version(found)


def unpack(tree: Path, files: Sequence[Path]) -> None:
    """Unpack packages into ``tree``, which becomes a merged-/usr root folder."""
    tree.chmod(0o755)
    for name in _MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for name in FOLDERS:
        (tree / name).mkdir()
    for file in files:
        archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE)
        with archive:
            command = ["tar", "-x", "--no-same-owner", "--keep-directory-symlink", "-C", str(tree)]
            done = subprocess.run(command, stdin=archive.stdout, check=False, capture_output=True, text=True)
        if archive.returncode or done.returncode:
            raise HostError(f"cannot unpack {file}: {done.stderr.strip()[-200:]}")
    for name in ("doc", "man", "locale", "info", "iso-codes", "icons"):
        shutil.rmtree(tree / "usr/share" / name, ignore_errors=True)
    if not (tree / "bin/sh").exists():
        (tree / "bin/sh").symlink_to("busybox")


def compile_all(tree: Path, version: tuple[int, int]) -> None:
    """Compile the standard library, as its package does when installed: in the rig that takes minutes."""
    name = f"python{version[0]}.{version[1]}"
    library = "/usr/lib/x86_64-linux-gnu"
    command = [
        f"{tree}/lib64/ld-linux-x86-64.so.2", "--library-path", f"{tree}{library}", f"{tree}/usr/bin/{name}",
        "-I", "-m", "compileall", "-q", "-j0", "--invalidation-mode", "unchecked-hash",
        "-s", str(tree), "-p", "/", f"{tree}/usr/lib/{name}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONHOME": f"{tree}/usr"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"cannot compile the rig's Python library: {(done.stdout + done.stderr)[-400:]}")


def make(image: Path, tree: Path) -> None:
    """An ext4 image that holds the folder ``tree`` and little more. Raises HostError."""
    blocks = sum(-(-path.lstat().st_size // 4096) + 1 for path in tree.rglob("*"))
    with atomic.host_errors("write", image), atomic.replacing(image) as temporary:
        os.truncate(temporary, blocks * 4096 * 11 // 10 + _SPARE)
        command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^has_journal", "-m", "0"]
        command += ["-E", "root_owner=0:0", "-d", str(tree), str(temporary)]
        done = subprocess.run(command, env=SBIN, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostError(f"cannot make {image}: {(done.stderr or done.stdout).strip()[-300:]}")
