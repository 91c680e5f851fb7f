"""A QEMU machine as a client of `qvm serve`, and a Linux in it that does what a test says.

Its guest is the one of `qvm guest build debian-amd64`, made from qvm's cache. A test types shell scripts
into its serial port and gets what they print; so many tests share one boot.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import itertools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from qvm_guests import build, recipes
from qvm_guests.progress import Progress

from qvmcore.api import HostError

SYSTEM_QEMU = "qemu-system-x86_64"
#: Seconds; emulated machines on a busy host are slow, and no test measures time.
LIMIT = 90.0
#: What the guest loads beside what every guest does.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio-rng", "virtio_console")
#: Runs in the guest: each line is a script in base64, answered by its output between two marks.
SHELL = r"""
stty -echo -icanon min 1 2>/dev/null
echo 0 > /proc/sys/kernel/printk
echo "<ready>"
while read -r number script; do
  echo "<$number>"
  echo "$script" | base64 -d > /tmp/script
  sh /tmp/script 2>&1 < /dev/null
  echo "</$number $?>"
done
"""
MEMORY = "256M"
#: Without share=on no other process can have the guest's memory.
SHARED = ("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on", "-machine", "memory-backend=ram")


class Machine:
    """A running QEMU: its serial port is ``text`` and ``type``, its monitor ``qmp``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        monitor, theirs = socket.socketpair()
        self.command = [
            # A machine does not outlive the test session, however that ends.
            "setpriv", "--pdeathsig", "KILL",
            *command, "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", "stdio",
            "-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control",
        ]  # fmt: skip
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        with theirs:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, **(environment or {})},
                pass_fds=(theirs.fileno(),),
            )
        self._output = bytearray()
        self._monitor = monitor
        self._replies = monitor.makefile("rb")
        self._greeted = False

    @property
    def text(self) -> str:
        """What the machine has said so far."""
        return self._output.decode(errors="replace").replace("\r", "")

    @property
    def complaints(self) -> str:
        """What QEMU has said on its standard error."""
        return os.pread(self._complaints.fileno(), 1 << 20, 0).decode(errors="replace")

    def _fail(self, what: str) -> NoReturn:
        """Fail the test with all that was said."""
        pytest.fail(f"{what} (exit {self.process.poll()}):\n{self.text[-4000:]}\n{self.complaints}")

    def _read(self, deadline: float) -> bool:
        """Take what comes next; False at the end of the output, and a failed test at the deadline."""
        assert self.process.stdout is not None
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            self._fail("the machine fell silent")
        chunk = os.read(self.process.stdout.fileno(), 65536)
        self._output += chunk
        return bool(chunk)

    def expect(self, pattern: str, start: int = 0, limit: float = LIMIT) -> re.Match[str]:
        """Wait for a pattern in the text behind ``start``."""
        deadline = time.monotonic() + limit
        while (match := re.compile(pattern).search(self.text, start)) is None:
            if not self._read(deadline):
                self.process.wait()
                self._fail(f"no {pattern!r}")
        return match

    def type(self, text: str) -> None:
        """Type on the serial port."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One command of the monitor; what it returns."""
        if not self._greeted:
            self._greeted = True
            self.qmp("qmp_capabilities")
        self._monitor.settimeout(LIMIT)
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        reply: dict[str, Any] = {}
        while "return" not in reply:
            line = self._replies.readline()
            if not line:
                self._fail(f"QEMU's monitor closed at {command}")
            reply = json.loads(line)  # or an event
            assert "error" not in reply, reply
        return reply["return"]

    def wait(self, limit: float = LIMIT) -> int:
        """Wait for the end of QEMU; its exit code."""
        deadline = time.monotonic() + limit
        while self._read(deadline):
            pass
        return self.process.wait()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Nothing of it stays."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        files = (self.process.stdin, self.process.stdout, self._replies, self._monitor, self._complaints)
        for end in files:
            if end is not None:
                with contextlib.suppress(OSError):  # unsent input of a machine that is gone
                    end.close()


class Linux(Machine):
    """A machine with the guest's kernel, whose serial port takes scripts. It is ready when this returns."""

    def __init__(
        self,
        devices: Sequence[str],
        *,
        append: str = "",
        qemu: Sequence[str] = (SYSTEM_QEMU,),
        environment: Mapping[str, str] | None = None,
        machine: str = "q35",
        cpus: int = 1,
    ) -> None:
        guest = guest_folder()
        script = base64.b64encode(SHELL.encode()).decode()
        super().__init__(
            [
                *qemu, "-machine", machine, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus),
                "-m", MEMORY, *SHARED,
                "-kernel", str(guest / build.KERNEL), "-initrd", str(guest / build.INITRAMFS),
                "-append", f"console=ttyS0 quiet panic=-1 {append} qvm.exec={script}",
                *devices,
            ],
            environment,
        )  # fmt: skip
        self._numbers = itertools.count(1)
        try:
            self.booted()
        except BaseException:
            self.close()
            raise

    def booted(self, start: int = 0) -> None:
        """Wait until it takes scripts; ``start`` is where in the text a reboot began."""
        self.expect("<ready>", start)

    def begin(self, script: str) -> int:
        """Let it begin a script; the number for ``end``."""
        number = next(self._numbers)
        self.type(f"{number} {base64.b64encode(script.encode()).decode()}\n")
        return number

    def end(self, number: int, limit: float = LIMIT) -> str:
        """What script ``number`` printed, without the last newline; a failed test when it failed."""
        match = self.expect(rf"(?s)<{number}>\n(.*?)\n?</{number} (\d+)>", limit=limit)
        assert match[2] == "0", f"exit status {match[2]} of the script in the guest:\n{match[1]}"
        return match[1]

    def run(self, script: str, limit: float = LIMIT) -> str:
        """Run a script to its end; what it printed."""
        return self.end(self.begin(script), limit)

    def restart(self) -> None:
        """Let the guest reboot itself; the same QEMU stays connected."""
        start = len(self.text)
        self.begin("sync; busybox reboot -f; sleep 60")
        self.booted(start)


@functools.cache
def guest_folder() -> Path:
    """Kernel and initramfs, from the cache of `qvm guest`; without them and a network the test is skipped."""
    folder = Path(tempfile.mkdtemp(prefix="qvm-foreign-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        build.build(recipes.find("debian-amd64"), folder, Progress(), modules=MODULES)
    except HostError as error:
        pytest.skip(f"no guest for QEMU: {error}")
    return folder
