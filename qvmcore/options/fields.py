"""Types for the fields of an options struct that TOML does not have (floor 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

#: A path on the host; a relative one starts at the directory of the VM file that names it.
HostPath = Annotated[Path, msgspec.Meta(extra={"qvm": "host-path"})]


class CommandLineText(str):
    """A value typed on the command line: ``yes``, ``4``, ``a,b`` are converted as the field asks."""

    __slots__ = ()


def host_path(text: str, base_dir: Path) -> Path:
    """An absolute path; ``~`` is a home directory. Raises ValueError for a path that cannot be."""
    if not text:
        raise ValueError("expected a file path, not ''")
    if "\0" in text:
        raise ValueError("a file path cannot hold a NUL character")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home directory for {text.partition('/')[0]!r}") from error
    # No resolve(): a symbolic link is the user's and stays visible in messages.
    return base_dir / path
