"""The packages that were fetched, one directory per recipe: used again only if every byte is right.

``manifest.json`` is written last, so a cache without it is an interrupted download: what is there is
kept and completed. One lock per recipe keeps two builds apart; it is a flock, so it ends with its
process however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qvm_guests import atomic

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Package:
    """One package file in the cache."""

    name: str
    version: str
    architecture: str
    file: str
    size: int
    sha256: str


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_home() -> Path:
    """Where all guests are kept: below XDG_CACHE_HOME, by default ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    root = base if base.is_absolute() else Path.home() / ".cache"
    return root / "qvm" / "guests"


class GuestCache:
    """The cache of one recipe."""

    def __init__(self, recipe: str) -> None:
        self.root = cache_home() / recipe
        self.debs = self.root / "debs"
        self.apt = self.root / "apt"
        self._manifest = self.root / "manifest.json"

    @contextmanager
    def locked(self, waiting: Callable[[str], None]) -> Iterator[int]:
        """Hold the cache alone; yields the descriptor, for child processes that must hold it as well."""
        with atomic.host_errors("use the cache", self.root):
            self.debs.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting(f"another build uses {self.root}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def path(self, package: Package) -> Path:
        """The file of a package."""
        return self.debs / package.file

    def verified(self, note: Callable[[str], None]) -> list[Package]:
        """The packages, if all are there and unharmed; otherwise none, and harmed ones are removed."""
        try:
            stored = json.loads(self._manifest.read_text())
            packages = [Package(**item) for item in stored["packages"]] if stored["format"] == _FORMAT else []
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            note(f"the cache manifest {self._manifest} is damaged ({error}): fetching again")
            return []
        complete = True
        for package in packages:
            path = self.debs / Path(package.file).name
            if not path.is_file():
                note(f"{package.file} is missing in the cache: fetching it")
                complete = False
            elif path.stat().st_size != package.size or sha256(path) != package.sha256:
                note(f"{package.file} in the cache is damaged: fetching it again")
                path.unlink()
                complete = False
        return packages if complete else []

    def commit(self, packages: Sequence[Package]) -> None:
        """Record ``packages`` as the complete content, then drop the files of older ones."""
        content = {"format": _FORMAT, "packages": [asdict(package) for package in packages]}
        atomic.write(self._manifest, (json.dumps(content, indent=2) + "\n").encode())
        keep = {package.file for package in packages}
        for path in self.debs.iterdir():
            if path.name not in keep:
                path.unlink()
