"""What every character device offers to a vdev, and what a vdev hands in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qvm_chardev.channel import STALL_SECONDS
from qvmcore.api import VdevContext, Worker


@dataclass(frozen=True, slots=True)
class EscapeActions:
    """What the escape key of a terminal may do; each runs on the worker thread."""

    quit: Callable[[], None]
    power_button: Callable[[], None]

    @classmethod
    def of(cls, ctx: VdevContext) -> EscapeActions:
        """What a vdev's context offers for both."""
        return cls(
            quit=lambda: ctx.request_shutdown("the escape key cut the power", code=3),
            power_button=ctx.press_power_button,
        )


@dataclass(frozen=True, slots=True)
class Wiring:
    """Everything a character device needs from its owner.

    ``on_input(data)``: bytes came from the host; take them all, and call ``pause_input`` when no
    more are wanted. ``on_writable()``: after ``write`` took less than it was given, there is room
    again. ``on_resize()``: the terminal has a new size. ``on_connection(connected)``: a client came or
    went, for the kinds that have clients (:attr:`CharSpec.has_clients`). All run on the worker thread.
    ``name`` names the vdev in messages; ``base`` is the directory relative paths start from. ``stall``
    are the seconds after which a receiver that takes nothing counts as gone; None: it is waited for.
    """

    worker: Worker
    on_input: Callable[[bytes], None]
    on_writable: Callable[[], None]
    on_resize: Callable[[], None]
    log: logging.LoggerAdapter[logging.Logger] | logging.Logger
    name: str
    escape: EscapeActions | None = None
    base: Path = Path()
    on_connection: Callable[[bool], None] = lambda connected: None
    stall: float | None = STALL_SECONDS


class CharDevice(Protocol):
    """The host side of a serial line. It never blocks and never raises once it is open.

    ``write``, ``pause_input``, ``resume_input``, ``size`` and ``status`` may be called from any
    thread; ``flush`` and ``close`` from any thread once the worker has stopped, or on the worker.
    """

    description: str

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take output; returns how many bytes were taken, 0 when full.

        After a short count ``on_writable`` follows. Bytes that nobody can receive (no client, host
        device gone, a client that stalls) are taken and dropped, and counted.
        """

    def pause_input(self) -> None:
        """Deliver no more input until :meth:`resume_input`; the host side keeps the bytes."""

    def resume_input(self) -> None:
        """Deliver input again, what was held back first."""

    def size(self) -> tuple[int, int] | None:
        """(columns, rows) of the terminal, or None when there is none."""

    def flush(self, timeout: float) -> bool:
        """Write out what is buffered, for at most ``timeout`` seconds; False if some is left."""

    def close(self) -> None:
        """Give everything back (terminal modes, links, sockets); idempotent."""

    def status(self) -> Mapping[str, Any]:
        """Counters and state as JSON-able values."""
