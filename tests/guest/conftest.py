"""Booting real guests: `qvm run` as a user runs it, with a script inside the guest."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: How long a boot may take before the test gives up; emulated CPUs on busy machines are slow.
BOOT_LIMIT = 240.0


def guest_folder() -> Path:
    """Where ./bootstrap puts the guest's kernel and initramfs."""
    return Path(os.environ.get("QVM_TEST_GUEST", ROOT / ".demo" / "debian-arm64"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder boots a guest."""
    for item in items:
        if ROOT / "tests" / "guest" in item.path.parents:
            item.add_marker("guest")


@dataclass
class Vm:
    """A running `qvm run`."""

    process: subprocess.Popen[bytes]
    output: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        """What guest and qvm have said so far."""
        return self.output.decode(errors="replace").replace("\r", "")

    def expect(self, pattern: str, limit: float = BOOT_LIMIT) -> re.Match[str]:
        """Wait for a pattern in the output; fails with the output when it does not come."""
        deadline = time.monotonic() + limit
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        while (match := re.search(pattern, self.text)) is None:
            chunk = self.process.stdout.read()
            if chunk:
                self.output += chunk
            elif chunk == b"" or time.monotonic() > deadline:
                pytest.fail(f"no {pattern!r} in the output (exit {self.process.poll()}):\n{self.text}")
            else:
                time.sleep(0.02)
        return match

    def send(self, number: signal.Signals) -> None:
        """Signal the qvm process."""
        self.process.send_signal(number)

    def type(self, text: str) -> None:
        """Type into the guest's console."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait(self, limit: float = BOOT_LIMIT) -> int:
        """Wait for the end; the exit code."""
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), True)
        try:
            rest, _ = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            rest, _ = self.process.communicate()
            pytest.fail(f"qvm did not end within {limit:g} s:\n{self.text}{rest.decode(errors='replace')}")
        self.output += rest or b""
        return self.process.returncode


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with ``vm.toml``: the guest with a virtio console on stdio; skips without a guest."""
    guest = guest_folder()
    if not (guest / "vmlinuz").exists():
        pytest.skip(f"no guest in {guest}; `qvm guest build debian-arm64 {guest}` makes one")
    (tmp_path / "vm.toml").write_text(
        f"""
[system]
name = "test"
board = "arm64-virt"
ram = "256M"

[load]
kernel = "{guest / "vmlinuz"}"
initrd = "{guest / "initramfs.cpio.gz"}"
cmdline = "console=hvc0 quiet"

[[vdev]]
type = "virtio-console"
name = "console0"
loc = 0x1c0e0000
intr = "gic:42"
hostdev = "stdio"
"""
    )
    return tmp_path


Start = Callable[..., Vm]


@pytest.fixture
def start(files: Path) -> Start:
    """``start(script, vdevs="[[vdev]]...", mode="fast", args=[...])`` starts ``qvm run``."""
    running: list[Vm] = []

    def begin(
        script: str | None = None,
        *,
        vdevs: str = "",
        mode: str = "",
        args: list[str] | None = None,
        cmdline: str = "",
        command: list[str] | None = None,
    ) -> Vm:
        machine = files / "machine.toml"
        machine.write_text(f'include = ["vm.toml"]\n{vdevs}')
        line = "console=hvc0 quiet " + cmdline
        if script is not None:
            line += " qvm.exec=" + base64.b64encode(script.encode()).decode()
        words = command or [sys.executable, "-m", "qvmcore"]
        environment = {**os.environ, "QVM_EMULATOR_MODE": mode}
        process = subprocess.Popen(
            [*words, "run", str(machine), "--set", f"load.cmdline={line}", *(args or [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=files,
            env=environment,
        )
        running.append(Vm(process))
        return running[-1]

    yield begin  # type: ignore[misc]
    for vm in running:
        if vm.process.poll() is None:
            vm.process.kill()
        vm.process.wait()
        for pipe in (vm.process.stdin, vm.process.stdout):
            if pipe is not None:
                pipe.close()


def disk(path: Path, size: int = 64 << 20) -> str:
    """A raw disk of random-free zeros, and the ``[[vdev]]`` table for it."""
    with path.open("wb") as image:
        image.truncate(size)
    return f"""
[[vdev]]
type = "virtio-blk"
name = "disk0"
loc = 0x1c0d0000
intr = "gic:41"
hostdev = "{path}"
"""
