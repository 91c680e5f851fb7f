"""Opens files, FIFOs, serial ports and commands; and the device that is nothing at all."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvm_chardev.device import Wiring
from qvm_chardev.line import Line
from qvm_chardev.spec import FORMS, CharSpec
from qvmcore.api import HostError, nearest

#: Seconds a command behind ``>|`` may take to end once its input is closed; then it is killed.
COMMAND_PATIENCE = 0.5


class Null:
    """Takes every byte and gives none."""

    description = "null"

    def __init__(self) -> None:
        self._dropped = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """See CharDevice."""
        self._dropped += len(data)
        return len(data)

    def pause_input(self) -> None:
        """There is no input."""

    def resume_input(self) -> None:
        """There is no input."""

    def size(self) -> tuple[int, int] | None:
        """There is no terminal."""
        return None

    def flush(self, timeout: float) -> bool:
        """Nothing is ever buffered."""
        return True

    def close(self) -> None:
        """Nothing is open."""

    def status(self) -> Mapping[str, Any]:
        """See CharDevice."""
        return {"hostdev": self.description, "received": 0, "sent": 0, "dropped": self._dropped}


def open_file(spec: CharSpec, wiring: Wiring) -> Line:
    """Open ``spec.path``: created or truncated for output, there already for input.

    Raises HostError with the reason, and with the nearest file name for one that is not there.
    """
    path = wiring.base / Path(spec.path).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise HostError.from_os("open", path, error) from error
    if stat.S_ISFIFO(mode):
        # Open for both: no end of file while no writer is there, no SIGPIPE or ENXIO without a reader.
        flags = os.O_RDWR
    elif spec.reads and spec.writes:
        if mode and not stat.S_ISCHR(mode):
            raise HostError(
                f"{wiring.name}: {path} cannot be both input and output",
                hint="write '>PATH' for output or '<PATH' for input",
            )
        flags = os.O_RDWR
    elif spec.reads:
        flags = os.O_RDONLY
    else:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if spec.append else os.O_TRUNC)
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        hint = _missing_hint(path, spec) if isinstance(error, FileNotFoundError) else ""
        raise HostError.from_os("open", path, error, hint=hint) from error
    return Line(fd, str(path), wiring, reads=spec.reads, writes=spec.writes)


def _missing_hint(path: Path, spec: CharSpec) -> str:
    try:
        near = nearest(path.name, [item.name for item in path.parent.iterdir()])
    except OSError:
        return f"there is no directory {path.parent}"
    if near or not spec.writes:
        return near
    return nearest(spec.path, ("stdio", "terminal", "null", "pty")) or f"hostdev is one of {FORMS}"


class CommandOutput(Line):
    """Output piped to a command (QNX 8.0's ``>|command``), started without a shell.

    What the command prints goes where qvm's own output goes.
    """

    def __init__(self, spec: CharSpec, wiring: Wiring) -> None:
        try:
            words = shlex.split(spec.path)
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, cwd=wiring.base, bufsize=0)
        except OSError as error:
            raise HostError.from_os("start", spec.path, error) from error
        except ValueError as error:
            raise HostError(f"{wiring.name}: command {spec.path!r}: {error}") from error
        pipe = self._process.stdin
        assert pipe is not None
        with pipe:
            fd = os.dup(pipe.fileno())
        os.set_blocking(fd, False)
        super().__init__(fd, f"| {spec.path}", wiring, reads=False, writes=True)

    def close(self) -> None:
        """Close the command's input and wait for its end; a command that stays is killed."""
        super().close()
        try:
            self._process.wait(COMMAND_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
