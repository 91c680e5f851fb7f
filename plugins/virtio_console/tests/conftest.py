"""Consoles on host devices under ``tmp_path``."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from qvm_chardev import stdio
from qvm_virtio_console.device import VirtioConsole

from qvmcore.testing.fakes import Plugged, plug


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Callable[..., Plugged[VirtioConsole]]]:
    """``console(**options)``: a plugged device; relative paths start at ``tmp_path``."""
    with ExitStack() as stack:

        def make(**options: object) -> Plugged[VirtioConsole]:
            return stack.enter_context(plug(VirtioConsole, options, base_dir=tmp_path))

        yield make


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(the person's side, qvm's standard input and output) of an 80x24 terminal."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    plain = stdio.Stdio.__init__

    def init(self: stdio.Stdio, *args: object, **kwargs: object) -> None:
        plain(self, *args, **{**kwargs, "input_fd": slave, "output_fd": slave})  # type: ignore[arg-type]

    monkeypatch.setattr(stdio.Stdio, "__init__", init)
    return master, slave
