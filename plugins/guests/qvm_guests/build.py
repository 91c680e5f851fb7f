"""From a recipe to a directory with a kernel, an initramfs and a manifest."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvm_guests import atomic, initramfs
from qvm_guests.apt import PrivateApt
from qvm_guests.cache import GuestCache, Package
from qvm_guests.debs import DebArchive
from qvm_guests.modules import Closure, ModuleTree
from qvm_guests.progress import Progress
from qvm_guests.recipes import Recipe
from qvmcore.api import HostError

KERNEL = "vmlinuz"
INITRAMFS = "initramfs.cpio.gz"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Guest:
    """The content of one guest, ready to be written."""

    release: str
    kernel: bytes
    initramfs: bytes
    closure: Closure


def build(
    recipe: Recipe,
    directory: Path,
    progress: Progress,
    *,
    refresh: bool = False,
    sources: Path | None = None,
    modules: Sequence[str] = (),
) -> None:
    """Make the guest in ``directory``. Without ``refresh`` a complete cache is used and no network."""
    cache = GuestCache(recipe.name)
    with atomic.host_errors("write to", directory), _reserved(directory):
        with cache.locked(progress.note) as lock:
            packages = obtain(recipe, cache, progress, lock, refresh=refresh, sources=sources)
            progress.step("building the initramfs")
            with atomic.host_errors("read the cache", cache.root):
                guest = assemble(recipe, cache, packages, modules)
        write(recipe, guest, packages, directory)


@contextmanager
def _reserved(directory: Path) -> Iterator[None]:
    """Hold the output directory alone; found unfit now, not after minutes of download."""
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not os.access(directory, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
        yield
    except BaseException:
        if not existed and not any(directory.iterdir()):
            directory.rmdir()
        raise
    finally:
        os.close(handle)


def obtain(
    recipe: Recipe, cache: GuestCache, progress: Progress, lock: int, *, refresh: bool, sources: Path | None
) -> list[Package]:
    """The packages of the recipe, from the cache or from the network: kernel first, then busybox."""
    with atomic.host_errors("use the cache", cache.root):
        packages = cache.verified(progress.note)
        if packages and not refresh:
            progress.note(f"using the packages in {cache.root}")
            return packages
        apt = PrivateApt(cache.apt, recipe.architecture, progress, lock)
        apt.prepare(sources)
        apt.update(must=bool(packages))
        kernel = apt.dependency(recipe.kernel, "linux-image-")
        packages = apt.download([kernel, recipe.busybox], cache.debs)
        packages.sort(key=lambda package: package.name != kernel)
        cache.commit(packages)
        return packages


def assemble(recipe: Recipe, cache: GuestCache, packages: list[Package], modules: Sequence[str]) -> Guest:
    """Take what the guest needs out of the packages."""
    kernel_package, busybox_package = packages
    with DebArchive(cache.path(busybox_package)) as deb:
        busybox = deb.read(deb.find("bin/busybox", "usr/bin/busybox"))
    with DebArchive(cache.path(kernel_package)) as deb:
        tree = ModuleTree.of(deb)
        closure = tree.closure(recipe.modules, required=modules)
        kernel = deb.read(deb.find(f"boot/vmlinuz-{tree.release}", f"usr/lib/modules/{tree.release}/vmlinuz"))
    return Guest(tree.release, kernel, initramfs.build(busybox, tree.release, closure), closure)


def write(recipe: Recipe, guest: Guest, packages: list[Package], directory: Path) -> None:
    """Put the files into ``directory``; the manifest last, so that it never speaks of files to come."""
    files = {KERNEL: guest.kernel, INITRAMFS: guest.initramfs}
    content = {
        "recipe": recipe.name,
        "architecture": recipe.architecture,
        "board": recipe.board,
        "kernel_release": guest.release,
        "modules": [module.name for module in guest.closure.modules],
        "modules_built_in": list(guest.closure.builtin),
        "modules_absent": list(guest.closure.absent),
        "packages": [asdict(package) for package in packages],
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    files[MANIFEST] = (json.dumps(content, indent=2) + "\n").encode()
    with ExitStack() as stack:
        # All are written before the first is renamed; a stack unwinds backwards: the manifest last.
        for name in (MANIFEST, INITRAMFS, KERNEL):
            stack.enter_context(atomic.replacing(directory / name)).write_bytes(files[name])


def manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a built guest."""
    path = directory / MANIFEST
    hint = "make the guest with: qvm guest build RECIPE DIR"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise HostError.from_os("read", path, error, hint=hint) from error
    except ValueError as error:
        raise HostError(f"{path} is damaged: {error}", hint=hint) from error
    if not isinstance(content, dict) or "recipe" not in content:
        raise HostError(f"{path} is not the manifest of a qvm guest", hint=hint)
    return content


def snippet(recipe: Recipe, directory: Path) -> str:
    """The beginning of a VM file for the guest."""
    place = json.dumps  # a TOML basic string has JSON's escapes
    return (
        f'[system]\nname = "{recipe.name}"\nboard = "{recipe.board}"\nram = "256M"\n\n'
        f"[load]\nkernel = {place(str(directory / KERNEL))}\ninitrd = {place(str(directory / INITRAMFS))}\n"
        f'cmdline = "console={recipe.console}"\n'
    )
