"""What the commands of one invocation share: the plugins, and how much to say."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvmcore.plugins import PluginHost
    from qvmcore.types import MachineSpec


class State:
    """One invocation. ``started`` is set once a guest runs; it decides between two exit codes."""

    def __init__(self, host: PluginHost | None = None) -> None:
        self.debug = os.environ.get("QVM_DEBUG", "") not in ("", "0")
        self.started = False
        self._host = host

    @property
    def host(self) -> PluginHost:
        """The installed plugins; their metadata is read at first use."""
        if self._host is None:
            from qvmcore.plugins import PluginHost

            self._host = PluginHost()
        return self._host

    def compose(self, files: Sequence[Path], overrides: Sequence[str], *, guest: bool = True) -> MachineSpec:
        """The machine of a VM file; only its vdevs without a ``guest``. Raises ConfigError."""
        from qvmcore.compose import compose

        return compose(files, overrides, self.host, guest=guest)


def set_up_logging(verbosity: int, log_file: str | None) -> None:
    """Messages go to stderr, and with times and everything to ``log_file``.

    ``verbosity``: -1 warnings and errors, 0 also information, 1 everything.
    """
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _ToStderr | _ToFile):
            root.removeHandler(handler)
            handler.close()
    to_stderr = _ToStderr()
    to_stderr.setLevel(level)
    root.addHandler(to_stderr)
    if log_file is not None:
        to_file = _ToFile(log_file)
        to_file.setFormatter(_Dated("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(to_file)
    root.setLevel(logging.DEBUG if log_file is not None else level)


def _subject(record: logging.LogRecord) -> str:
    """``NAME: `` for what a vdev says of itself, unless it begins with that."""
    prefix = f"{getattr(record, 'vdev', '')}: "
    return "" if prefix == ": " or record.getMessage().startswith(prefix) else prefix


class _ToFile(logging.FileHandler):
    """The log file."""


class _Dated(logging.Formatter):
    """Lines that say which vdev they are about."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The message with its subject."""
        record.message = f"{_subject(record)}{record.message}"
        return super().formatMessage(record)


class _ToStderr(logging.Handler):
    """``qvm: text``; a terminal may be in raw mode, so lines end with a carriage return there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            kind = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            text = f"qvm: {kind}{_subject(record)}{self.format(record)}"
            end = "\n"
            if sys.stderr.isatty():
                text, end = text.replace("\n", "\r\n"), "\r\n"
            sys.stderr.write(text + end)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)
