"""Debian packages with everything they depend on, kept like the packages of a guest (`qvm guest build`).

Nothing is installed on this machine: apt works on a state of its own, and the packages are unpacked
into a folder by their user.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence

from qvm_guests.apt import PrivateApt
from qvm_guests.cache import GuestCache, Package
from qvm_guests.progress import Progress

from qvmcore.api import HostError

#: `apt-get install --print-uris`: address, name_version_architecture.deb, size, checksum.
_PLANNED = re.compile(r"^'[^']*' ([^_\s]+)_\S+\.deb \d+", re.MULTILINE)
_INDEX = "$(REPO_URI) $(RELEASE) $(COMPONENT)"


class ClosureApt(PrivateApt):
    """The private apt of guests, which can also say what a package needs to run."""

    def closure(self, names: Sequence[str]) -> list[str]:
        """``names`` and all they depend on. Raises HostError when the sources do not have one."""
        planned = self._run("apt-get", "install", "-qq", "--no-install-recommends", "--print-uris", *names)
        if planned.problem:
            raise self._unavailable(" and ".join(names))
        return _PLANNED.findall(planned.output)

    def mirror(self, release: str) -> str:
        """Where this machine has its own release from, for another one: ``release``, by its codename.

        Raises HostError when that cannot be told.
        """
        codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        targets = self._run("apt-get", "indextargets", "--no-release-info", "--format", _INDEX)
        for line in targets.output.splitlines():
            uri, _, rest = line.partition(" ")
            if codename and rest in (f"{codename} main", f"{release} main"):
                return uri
        raise HostError(f"the apt sources of this machine name no mirror of its release {codename!r}")


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
