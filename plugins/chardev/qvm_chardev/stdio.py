"""Standard input and output as a serial line; raw mode, escape key and size when on a terminal."""

from __future__ import annotations

import os
import termios
from collections.abc import Mapping
from typing import Any

from qvm_chardev.channel import Channel, nonblocking_copy, unpollable
from qvm_chardev.device import Wiring
from qvm_chardev.escape import HELP_TEXT, Command, EscapeFilter
from qvm_chardev.rawmode import RawMode, in_foreground
from qvm_chardev.reader import FileReader
from qvmcore.api import HostError

#: Seconds between looks at the terminal (size, job control); the whole idle cost of a terminal.
TICK_SECONDS = 1.0
#: Bytes typed ahead that are kept while the guest does not read.
TYPE_AHEAD = 4096


class Stdio:
    """A :class:`~qvm_chardev.device.CharDevice` on two descriptors, by default 0 and 1.

    The descriptors stay open; each is used through a copy of its own. A missing one (closed by the
    parent) counts as empty.
    """

    def __init__(
        self, wiring: Wiring, *, reads: bool, writes: bool, terminal: bool = False,
        input_fd: int = 0, output_fd: int = 1,
    ) -> None:  # fmt: skip
        self.description = "the terminal" if terminal else "standard input and output"
        self._wiring = wiring
        self._escape = EscapeFilter() if wiring.escape is not None else None
        self._output: Channel | None = None
        self._input: Channel | FileReader | None = None
        self._raw: RawMode | None = None
        self._tty = -1
        self._size: tuple[int, int] | None = None
        self._held = bytearray()
        self._paused = self._closed = False
        self._ignored = 0
        try:
            self._open(input_fd if reads else -1, output_fd if writes else -1, terminal)
        except BaseException:
            # Raw mode must not survive a start that fails half-way.
            self.close()
            raise

    def _open(self, input_fd: int, output_fd: int, terminal: bool) -> None:
        wiring = self._wiring
        if terminal and not (_is_tty(input_fd) and _is_tty(output_fd)):
            raise HostError(
                f"{wiring.name}: standard input and output are no terminal",
                hint='use hostdev = "stdio", or start qvm from a terminal',
            )
        if _is_open(output_fd):
            copy = nonblocking_copy(output_fd, os.O_WRONLY)
            self._output = Channel(
                copy, worker=wiring.worker, on_space=wiring.on_writable, on_lost=self._output_lost,
                stall=wiring.stall,
            )  # fmt: skip
        for fd in (output_fd, input_fd):
            if _is_tty(fd):
                self._tty = fd
        self._size = self.size()
        if _is_open(input_fd):
            self._open_input(input_fd)
        if self._tty >= 0:
            wiring.worker.call_later(TICK_SECONDS, self._tick)

    def _open_input(self, fd: int) -> None:
        wiring, worker = self._wiring, self._wiring.worker
        copy = nonblocking_copy(fd, os.O_RDONLY)
        if unpollable(copy):
            self._input = FileReader(copy, worker=worker, on_input=self._typed)
            self._input.start()
            return
        channel = Channel(
            copy, worker=worker, on_space=_nothing, on_lost=self._input_lost, on_input=self._typed
        )
        self._input = channel
        if _is_tty(fd):
            self._raw = RawMode(fd, shared=True)
            if in_foreground(fd):
                self._raw.enter()
            else:
                channel.pause_input(True)
                wiring.log.warning("%s: qvm runs in the background and does not read", wiring.name)
        channel.start()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """See CharDevice."""
        if self._output is None:
            self._ignored += len(data)
            return len(data)
        return self._output.write(data)

    def pause_input(self) -> None:
        """See CharDevice. A terminal is read on, so that the escape key works with a hung guest."""
        self._paused = True
        if self._input is not None and self._raw is None:
            self._input.pause_input(True)

    def resume_input(self) -> None:
        """See CharDevice."""
        self._paused = False
        if self._held:
            self._wiring.worker.call(self._release_held)
        if self._input is not None and self._raw is None:
            self._input.pause_input(False)

    def size(self) -> tuple[int, int] | None:
        """See CharDevice."""
        if self._tty < 0:
            return None
        try:
            columns, rows = os.get_terminal_size(self._tty)
        except OSError:
            return None
        return (columns, rows) if columns and rows else None

    def flush(self, timeout: float) -> bool:
        """See CharDevice."""
        return self._output is None or self._output.flush(timeout)

    def close(self) -> None:
        """See CharDevice."""
        self._closed = True
        if self._raw is not None:
            self._raw.leave()
        for side in (self._input, self._output):
            if side is not None:
                side.close()

    def status(self) -> Mapping[str, Any]:
        """See CharDevice."""
        output = self._output
        return {
            "hostdev": self.description,
            "received": self._input.received if self._input is not None else 0,
            "sent": output.sent if output is not None else 0,
            "dropped": self._ignored + (output.dropped if output is not None else 0),
        }

    def _typed(self, data: bytes) -> None:
        commands: list[Command] = []
        if self._escape is not None and self._raw is not None:
            data, commands = self._escape.feed(data)
        if data:
            if self._paused or self._held:
                kept = data[: TYPE_AHEAD - len(self._held)]
                self._held += kept
                self._ignored += len(data) - len(kept)
            else:
                self._wiring.on_input(data)
        for command in commands:
            self._obey(command)

    def _release_held(self) -> None:
        if not self._paused and not self._closed:
            data, self._held = bytes(self._held), bytearray()
            if data:
                self._wiring.on_input(data)

    def _obey(self, command: Command) -> None:
        actions = self._wiring.escape
        if actions is None:
            return
        if command is Command.QUIT:
            actions.quit()
        elif command is Command.POWER_BUTTON:
            actions.power_button()
        elif self._output is not None:
            self._output.write(HELP_TEXT.encode())

    def _tick(self) -> None:
        """Notice a new size, and a shell that stopped and continued qvm, without signal handlers."""
        if self._closed:
            return
        self._wiring.worker.call_later(TICK_SECONDS, self._tick)
        size = self.size()
        if size != self._size:
            self._size = size
            self._wiring.on_resize()
        if self._raw is not None and isinstance(self._input, Channel):
            foreground = in_foreground(self._tty)
            if foreground:
                try:
                    self._raw.enter()
                except termios.error:
                    # The terminal hung up; the input side reports that by itself.
                    return
            self._input.pause_input(not foreground)

    def _input_lost(self, error: OSError | None) -> None:
        self._wiring.log.debug("%s: standard input ended (%s)", self._wiring.name, error or "end of file")

    def _output_lost(self, error: OSError | None) -> None:
        self._wiring.log.warning(
            "%s: standard output failed (%s); guest output is dropped from here on", self._wiring.name, error
        )


def _nothing() -> None:
    """An input-only channel never has room to report."""


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _is_tty(fd: int) -> bool:
    return fd >= 0 and os.isatty(fd)
