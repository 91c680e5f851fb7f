"""The source of Debian's Python, checked by apt against the signed index of its release."""

from __future__ import annotations

import re
from pathlib import Path

from qvm_guests import atomic
from qvm_guests.cache import GuestCache, Package, sha256
from qvm_guests.progress import Progress

from qvmcore.api import HostError
from tests.rig import packages

#: The release it comes from, and the package: the newest of a stable Debian. Python 3.14 is in testing only.
RELEASE, PACKAGE = "trixie", "python3.13"
#: `apt-get source --print-uris`: address, file, size, checksum.
_ORIGINAL = re.compile(r"^'([^']*)' (\S+_([^_\s]+)\.orig\.tar\.\w+) (\d+) SHA256:([0-9a-f]+)", re.MULTILINE)


class SourceApt(packages.ClosureApt):
    """The private apt with the index of source packages."""

    def _configuration(self) -> str:
        return super()._configuration() + 'Acquire::IndexTargets::deb-src::Sources::DefaultEnabled "true";\n'

    def original(self, name: str, into: Path) -> Package:
        """Fetch what ``name`` is made from, without Debian's changes. Raises HostError."""
        planned = self._run("apt-get", "source", "-qq", "--tar-only", "--print-uris", name)
        match = _ORIGINAL.search(planned.output)
        if planned.problem or match is None:
            raise HostError(f"{RELEASE} has no source of {name}: {planned.problem or planned.output[-300:]}")
        address, file, version, size, checksum = match.groups()
        path = into / file
        if not path.is_file() or sha256(path) != checksum:
            self._progress.step(f"fetching {file}, {int(size) / 1e6:.1f} MB")
            ran = self._run(self._helper(), "download-file", address, str(path), f"SHA256:{checksum}")
            if ran.problem:
                raise HostError(f"cannot fetch {file}: {ran.problem}")
        return Package(name, version, "source", file, int(size), checksum)


def obtain(cache: GuestCache, progress: Progress, lock: int) -> Package:
    """The source in the cache, from the network only when it is missing. Raises HostError."""
    found = cache.verified(progress.note)
    if found:
        return found[0]
    apt = SourceApt(cache.apt, "amd64", progress, lock)
    apt.prepare()
    sources = cache.root / f"{RELEASE}.list"
    atomic.write(sources, f"deb-src {apt.mirror(RELEASE)} {RELEASE} main\n".encode())
    apt.prepare(sources)
    apt.update(must=True)
    package = apt.original(PACKAGE, cache.debs)
    cache.commit([package])
    return package
