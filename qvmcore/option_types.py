"""Types for the fields of an options struct that TOML does not have (floor 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

#: A path on the host; a relative one starts at the directory of the VM file that names it.
HostPath = Annotated[Path, msgspec.Meta(extra={"qvm": "host-path"})]


class CommandLineText(str):
    """A value typed on the command line: ``yes``, ``4``, ``a,b`` are converted as the field asks."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class HostDev:
    """QNX's ``hostdev``: a host path with a direction. ``<path`` = read only, ``>path`` = write only.

    ``path`` is absolute unless it is ``-``, which stands for qvm's own terminal.
    """

    path: Path
    readable: bool = True
    writable: bool = True

    @classmethod
    def parse(cls, text: str, base_dir: Path) -> HostDev:
        """Relative paths start at ``base_dir``. Raises ValueError for an empty path."""
        direction = text[:1] if text[:1] in ("<", ">") else ""
        name = text.removeprefix(direction).strip()
        path = Path(name) if name == "-" else host_path(name, base_dir)
        return cls(path, readable=direction != ">", writable=direction != "<")

    def __str__(self) -> str:
        return ("" if self.readable and self.writable else "<" if self.readable else ">") + str(self.path)


def host_path(text: str, base_dir: Path) -> Path:
    """An absolute path. Raises ValueError for an empty one."""
    if not text:
        raise ValueError("expected a file path, not ''")
    if "\0" in text:
        raise ValueError("a file path cannot hold a NUL character")
    # No resolve(): a symbolic link is the user's and stays visible in messages.
    return base_dir / Path(text).expanduser()
