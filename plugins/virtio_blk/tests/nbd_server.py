"""Real NBD servers for tests: nbdkit and qemu-nbd, on Unix sockets."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

#: The flag of a socket that listens, in /proc/net/unix.
LISTENING = "00010000"


class Server:
    """An NBD server of ``image`` on a Unix socket; may be stopped, killed and started again.

    ``flavour`` is "nbdkit" or "qemu-nbd"; ``words`` are further arguments, for
    nbdkit one option and then parameters. Skips without the program.
    """

    def __init__(
        self, folder: Path, image: Path, flavour: str = "nbdkit", words: tuple[str, ...] = ()
    ) -> None:
        if shutil.which(flavour) is None:
            pytest.skip(f"{flavour} is not installed")
        self.socket = folder / "nbd.sock"
        if flavour == "nbdkit":
            self.command = [
                "nbdkit",
                "-f",
                "-U",
                str(self.socket),
                *words[:1],
                "file",
                str(image),
                *words[1:],
            ]
        else:
            self.command = ["qemu-nbd", "-t", "-k", str(self.socket), "-f", "raw", "--discard=unmap",
                            "-x", "", *words, str(image)]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """What hostdev says."""
        return f"nbd+unix:///?socket={self.socket}"

    def start(self) -> Server:
        """Start it and wait until it listens."""
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        return self

    def _listens(self) -> bool:
        """Whether the socket takes connections; it is there earlier. None is made: it would count."""
        lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
        return any(words[3] == LISTENING and words[-1] == str(self.socket) for words in lines)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, e.g. SIGSTOP to make it silent."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            # It goes on for a moment, and that may be enough for an answer.
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def start_tcp(self) -> int:
        """Start nbdkit on a port of 127.0.0.1 instead; the port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.process = subprocess.Popen(
            ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *self.command[4:]], stdin=subprocess.DEVNULL
        )
        return port

    def kill(self) -> None:
        """kill -9; idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
