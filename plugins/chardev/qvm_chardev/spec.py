"""What a ``hostdev`` string means. Pure: opens nothing, so options can be checked with it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

#: One line per form, for help texts and errors.
FORMS = (
    "'stdio', 'terminal', 'null', 'pty[:LINK]', 'unix:PATH', 'file:PATH', 'PATH' (both directions), "
    "'<PATH' (input), '>PATH' (output), '>>PATH' (output, append), '>|COMMAND', '<-', '>-'"
)

#: Longest path of a Unix socket in bytes; the kernel's sun_path holds one more for the zero byte.
UNIX_PATH_MAX = 107


class Kind(enum.Enum):
    """The sorts of host device."""

    STDIO = "stdio"
    TERMINAL = "terminal"
    NULL = "null"
    PTY = "pty"
    UNIX = "unix"
    FILE = "file"
    COMMAND = "command"


@dataclass(frozen=True, slots=True)
class CharSpec:
    """A parsed ``hostdev``.

    ``path`` is a file, a socket, the optional link of a pty, or a command line. ``reads`` and
    ``writes`` are seen from the guest: whether bytes come from, and go to, the host device.
    """

    kind: Kind
    path: str = ""
    reads: bool = True
    writes: bool = True
    append: bool = False

    @property
    def claims(self) -> tuple[str, ...]:
        """What of the process only one vdev can have; for ``Vdev.claims``."""
        if self.kind not in (Kind.STDIO, Kind.TERMINAL):
            return ()
        return ("standard input",) * self.reads + ("standard output",) * self.writes

    @property
    def has_clients(self) -> bool:
        """Whether somebody connects and disconnects; the other kinds are always there."""
        return self.kind in (Kind.PTY, Kind.UNIX)


def parse_spec(text: str) -> CharSpec:
    """Parse a ``hostdev`` string. Raises ValueError with a sentence that lists the legal forms."""
    spec = _parse(text.strip())
    if spec.kind is not Kind.COMMAND:
        try:
            Path(spec.path).expanduser()
        except RuntimeError as error:
            user = spec.path.partition("/")[0]
            raise ValueError(f"hostdev: there is no home directory for {user!r}") from error
    return spec


def _parse(text: str) -> CharSpec:
    if "\0" in text:
        raise ValueError("hostdev must not contain a zero byte")
    if text.startswith("<"):
        path = _required(text[1:], "<", "a path")
        return CharSpec(Kind.STDIO if path == "-" else Kind.FILE, "" if path == "-" else path, writes=False)
    if text.startswith(">"):
        return _output(text)
    if text in ("stdio", "terminal", "null"):
        return CharSpec(Kind(text))
    if text == "pty":
        return CharSpec(Kind.PTY)
    head, colon, rest = text.partition(":")
    if colon and head in ("pty", "unix", "file"):
        path = _required(rest, head + ":", "a path")
        if head == "file":
            return CharSpec(Kind.FILE, path, reads=False)
        return CharSpec(Kind(head), path)
    if not text:
        raise ValueError(f"hostdev is empty; expected one of {FORMS}")
    return CharSpec(Kind.FILE, text)


def _output(text: str) -> CharSpec:
    append = text.startswith(">>")
    rest = text.lstrip(">").strip() if append else text[1:].strip()
    if rest.startswith("|"):
        return CharSpec(Kind.COMMAND, _required(rest[1:], ">|", "a command"), reads=False)
    path = _required(rest, ">>" if append else ">", "a path")
    if path == "-":
        return CharSpec(Kind.STDIO, reads=False)
    return CharSpec(Kind.FILE, path, reads=False, append=append)


def _required(rest: str, prefix: str, what: str) -> str:
    rest = rest.strip()
    if not rest:
        raise ValueError(f"hostdev {prefix!r} needs {what} behind it")
    return rest
