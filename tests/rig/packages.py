"""Debian packages with everything they depend on, kept like the packages of a guest (`qvm guest build`).

Nothing is installed on this machine: apt works on a state of its own, and the packages are unpacked
into a folder by their user.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qvm_guests.apt import PrivateApt
from qvm_guests.cache import GuestCache, Package
from qvm_guests.progress import Progress

#: `apt-get install --print-uris`: address, name_version_architecture.deb, size, checksum.
_PLANNED = re.compile(r"^'[^']*' ([^_\s]+)_\S+\.deb \d+", re.MULTILINE)


class ClosureApt(PrivateApt):
    """The private apt of guests, which can also say what a package needs to run."""

    def closure(self, names: Sequence[str]) -> list[str]:
        """``names`` and all they depend on. Raises HostError when the sources do not have one."""
        planned = self._run("apt-get", "install", "-qq", "--no-install-recommends", "--print-uris", *names)
        if planned.problem:
            raise self._unavailable(" and ".join(names))
        return _PLANNED.findall(planned.output)


def obtain(cache: GuestCache, names: Sequence[str], progress: Progress, lock: int) -> list[Package]:
    """The packages ``names`` with what they depend on, for amd64; from the network only what is missing.

    ``lock`` is what ``cache.locked`` gave. Raises HostError with what to do.
    """
    packages = cache.verified(progress.note)
    if set(names) <= {package.name for package in packages}:
        return packages
    apt = ClosureApt(cache.apt, "amd64", progress, lock)
    apt.prepare()
    apt.update(must=False)
    packages = apt.download(apt.closure(names), cache.debs)
    cache.commit(packages)
    return packages
