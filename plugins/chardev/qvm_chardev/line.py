"""A character device on one descriptor: a file, a FIFO, a serial port, a pipe to a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qvm_chardev.channel import Channel, unpollable
from qvm_chardev.device import Wiring
from qvm_chardev.rawmode import RawMode
from qvm_chardev.reader import FileReader


class Line:
    """A :class:`~qvm_chardev.device.CharDevice` that owns ``fd``.

    A terminal or serial port is put into raw mode until :meth:`close`.
    """

    def __init__(self, fd: int, description: str, wiring: Wiring, *, reads: bool, writes: bool) -> None:
        self.description = description
        self._wiring = wiring
        self._writes = writes
        self._raw = RawMode(fd) if os.isatty(fd) else None
        self._ignored = 0
        self._side: Channel | FileReader
        if reads and unpollable(fd):
            self._side = FileReader(fd, worker=wiring.worker, on_input=wiring.on_input)
        else:
            self._side = Channel(
                fd,
                worker=wiring.worker,
                on_space=wiring.on_writable,
                on_lost=self._lost,
                on_input=wiring.on_input if reads else None,
                stall=wiring.stall,
            )
        if self._raw is not None:
            self._raw.enter()
        self._side.start()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """See CharDevice."""
        if not self._writes or not isinstance(self._side, Channel):
            self._ignored += len(data)
            return len(data)
        return self._side.write(data)

    def pause_input(self) -> None:
        """See CharDevice."""
        self._side.pause_input(True)

    def resume_input(self) -> None:
        """See CharDevice."""
        self._side.pause_input(False)

    def size(self) -> tuple[int, int] | None:
        """A file has no size in characters, and a serial port does not know its own."""
        return None

    def flush(self, timeout: float) -> bool:
        """See CharDevice."""
        return not isinstance(self._side, Channel) or self._side.flush(timeout)

    def close(self) -> None:
        """See CharDevice."""
        if self._raw is not None:
            self._raw.leave()
        self._side.close()

    def status(self) -> Mapping[str, Any]:
        """See CharDevice."""
        output = self._side if isinstance(self._side, Channel) else None
        return {
            "hostdev": self.description,
            "received": self._side.received,
            "sent": output.sent if output else 0,
            "dropped": self._ignored + (output.dropped if output else 0),
        }

    def _lost(self, error: OSError | None) -> None:
        if error is not None:
            self._wiring.log.warning(
                "%s: %s failed: %s; output is dropped from here on",
                self._wiring.name, self.description, error.strerror,
            )  # fmt: skip
