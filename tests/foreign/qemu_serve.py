"""`qvm serve` in a process of its own, which tests end, kill and start again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

#: Seconds until its sockets are there, or it has ended.
LIMIT = 60.0


class Serve:
    """Serves the vdevs of ``text``, a VM file, by ``protocol``; ready when this returns.

    Relative paths in ``text`` start at ``folder``. ``log`` is what all its processes have said.
    """

    def __init__(self, folder: Path, text: str, protocol: str, *words: str) -> None:
        self.folder = folder
        # A socket's address has 107 bytes, and pytest's folders have long names.
        self.sockets = Path(tempfile.mkdtemp(prefix="qvm-"))
        self._log = folder / "serve.log"
        self._file = folder / "serve.toml"
        self._file.write_text(f'[system]\nname = "{self.sockets.name}"\n{text}')
        self._command = [
            # It does not outlive the test session, however that ends.
            "setpriv", "--pdeathsig", "KILL",
            sys.executable, "-m", "qvmcore", "serve", str(self._file), f"--{protocol}", str(self.sockets),
            *words,
        ]  # fmt: skip
        self._names = [line.split('"')[1] for line in text.splitlines() if line.startswith("name = ")]
        self.start()

    def start(self) -> None:
        """Start it (again), and wait until it has told how each vdev is attached."""
        begin = len(self.log)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        deadline = time.monotonic() + LIMIT
        while not all(str(self.socket(name)) in self.log[begin:] for name in self._names):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                pytest.fail(f"`qvm serve` does not serve (exit {self.process.poll()}):\n{self.log}")
            time.sleep(0.05)

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def socket(self, name: str) -> Path:
        """Where a vdev is served."""
        return self.sockets / f"{name}.sock"

    def line(self, name: str, vmm: str) -> str:
        """The command line it printed for a vdev."""
        told = self.log[self.log.index(str(self.socket(name))) :]
        return told[told.index(f"  {vmm}:") :].splitlines()[1].strip()

    def said(self, words: str, limit: float = LIMIT) -> None:
        """Wait until the log has ``words``."""
        deadline = time.monotonic() + limit
        while words not in self.log:
            if time.monotonic() > deadline:
                pytest.fail(f"no {words!r} in the log of `qvm serve`:\n{self.log}")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT)

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """End it, whatever it does."""
        if self.alive():
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)
