"""Reading a Debian package as its user: members are read by name, nothing is ever unpacked.

So no path inside a package can lead outside; a path that tries is refused all the same, because a
package with such a path is not what it claims to be.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Self

from qvmcore.api import HostError


class DebArchive:
    """The files of one .deb, by path without a leading slash. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, tarfile.TarInfo] = {}

    def __enter__(self) -> Self:
        tool = shutil.which("dpkg-deb")
        if tool is None:
            raise HostError("there is no dpkg-deb on this machine", hint="install the package dpkg")
        # Beside the package: a temporary directory may be a small tmpfs, and this is 100 MB.
        self._data: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)
        try:
            done = subprocess.run(
                [tool, "--fsys-tarfile", str(self.path)],
                stdout=self._data,
                stderr=subprocess.PIPE,
                check=False,
            )
            if done.returncode:
                why = done.stderr.decode(errors="replace").strip().splitlines()
                raise HostError(
                    f"cannot read the package {self.path}: {why[-1] if why else 'dpkg-deb failed'}"
                )
            self._data.seek(0)
            self._tar = tarfile.open(fileobj=self._data, mode="r:")
            for member in self._tar:
                self._members[self._checked(member.name)] = member
        except BaseException:
            self._data.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        self._data.close()

    def _checked(self, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise HostError(f"the package {self.path} is not sound: it has a member {name!r}")
        return str(path)

    def names(self) -> list[str]:
        """Every member, sorted."""
        return sorted(self._members)

    def size(self, name: str) -> int:
        """The size of a member in bytes."""
        return self._members[name].size

    def read(self, name: str) -> bytes:
        """The content of a regular file (or of the file a hard link in the package means)."""
        stream = self._tar.extractfile(self._members[name])
        if stream is None:
            raise HostError(f"the package {self.path} is not sound: {name} is not a file")
        with stream:
            return stream.read()

    def find(self, *names: str) -> str:
        """The first of ``names`` that is in the package: distributions moved files into /usr."""
        for name in names:
            if name in self._members:
                return name
        raise HostError(f"the package {self.path} has no {' or '.join(names)}")
