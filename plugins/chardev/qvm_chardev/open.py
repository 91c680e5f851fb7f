"""From a ``hostdev`` string to an open character device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from qvm_chardev import channel
from qvm_chardev.device import CharDevice, EscapeActions, Wiring
from qvm_chardev.files import CommandOutput, Null, open_file
from qvm_chardev.pty import Pty
from qvm_chardev.sockets import UnixSocket
from qvm_chardev.spec import CharSpec, Kind, parse_spec
from qvm_chardev.stdio import Stdio
from qvmcore.api import HostError, Worker


def _nothing() -> None:
    """For an owner that does not care."""


def open_chardev(
    spec: str | CharSpec,
    *,
    worker: Worker,
    on_input: Callable[[bytes], None],
    on_writable: Callable[[], None] = _nothing,
    on_resize: Callable[[], None] = _nothing,
    log: logging.LoggerAdapter[logging.Logger] | logging.Logger,
    name: str,
    escape: EscapeActions | None = None,
    base: Path | None = None,
    on_connection: Callable[[bool], None] = lambda connected: None,
    lossless: bool = False,
) -> CharDevice:
    """Open a host device for the serial line of vdev ``name``; call it in ``on_configured``.

    See :class:`~qvm_chardev.device.Wiring` for the callbacks. ``escape`` None means that a
    terminal has no escape key. ``lossless``: a receiver that takes nothing is waited for as long as
    it is connected, for a guest that can wait; else its output is dropped after a while.

    Raises ValueError for a malformed ``spec`` and HostError when the host device cannot be opened;
    then nothing stays open and no terminal stays raw.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    wiring = Wiring(
        worker, on_input, on_writable, on_resize, log, name, escape, base or Path(), on_connection,
        None if lossless else channel.STALL_SECONDS,
    )  # fmt: skip
    match parsed.kind:
        case Kind.NULL:
            return Null()
        case Kind.STDIO | Kind.TERMINAL:
            terminal = parsed.kind is Kind.TERMINAL
            return Stdio(wiring, reads=parsed.reads, writes=parsed.writes, terminal=terminal)
        case Kind.PTY:
            return Pty(_path(parsed, wiring) if parsed.path else None, wiring)
        case Kind.UNIX:
            return UnixSocket(_path(parsed, wiring), wiring)
        case Kind.COMMAND:
            return CommandOutput(parsed, wiring)
        case Kind.FILE:
            return open_file(parsed, wiring)
    raise HostError(f"{name}: unknown kind of host device {parsed.kind}")


def _path(spec: CharSpec, wiring: Wiring) -> Path:
    return wiring.base / Path(spec.path).expanduser()
