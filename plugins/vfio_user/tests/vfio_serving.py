"""A real ``qvm serve --vfio-user`` process, seen from outside, and guests of another VMM attached to it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from qvm_vfio_user.testing import Client
from remote_function import RemoteFunction

from qvmcore.memory import GuestMemory
from qvmcore.testing.driver import GuestRam
from qvmcore.testing.fakes import BASE, RAM, FakeIrq
from qvmcore.testing.pci_driver import PciDriver

DEVICES = """\
[system]
name = "served"

[[vdev]]
type = "hello"
name = "hello0"

[[vdev]]
type = "virtio-entropy"
name = "rng0"

[[vdev]]
type = "virtio-blk"
name = "disk0"
hostdev = "disk.img"

[[vdev]]
type = "virtio-console"
name = "console0"
hostdev = ">console.out"

[[vdev]]
type = "virtio-net"
name = "net0"
none = true

[[vdev]]
type = "pci-dummy"
name = "dummy0"
vendor = 0x1234
"""
NAMES = ("hello0", "rng0", "disk0", "console0", "net0", "dummy0")
DISK_SECTORS = 256


def sector(number: int) -> bytes:
    """What ``disk.img`` has there at first."""
    return number.to_bytes(2, "little") * 256


def _usual_limit() -> None:
    """As many descriptors as a shell gives; the test run itself has more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


class Serving:
    """The process, in ``folder``, with sockets in ``folder/dir``. A context manager."""

    def __init__(self, folder: Path, text: str = DEVICES, names: tuple[str, ...] = NAMES) -> None:
        self.folder = folder
        (folder / "vm.toml").write_text(text)
        (folder / "disk.img").write_bytes(b"".join(map(sector, range(DISK_SECTORS))))
        (folder / "run").mkdir(mode=0o700)
        self._log = folder / "log"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_RUNTIME_DIR": str(folder / "run")}
        env.pop("QVM_DEBUG", None)
        with self._log.open("wb") as log, (folder / "out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qvmcore", "serve", "vm.toml", "--vfio-user", "dir"],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                preexec_fn=_usual_limit,
            )
        last = f"{names[-1]}.sock\n"
        self.wait(lambda: last in self.out, "it does not serve")
        self.idle = (self.fds(), self.threads())
        self.files = self.open_files()

    @property
    def out(self) -> str:
        """What it printed."""
        return (self.folder / "out").read_text()

    @property
    def log(self) -> str:
        """What it logged."""
        return self._log.read_text()

    def logged(self, since: int = 0) -> str:
        """What it logged behind the first ``since`` characters."""
        return self.log[since:]

    def fds(self) -> int:
        """Open descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """Threads."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def mapped(self) -> int:
        """Files of others that are mapped (memfds of clients)."""
        return Path(f"/proc/{self.process.pid}/maps").read_text().count("memfd:")

    def client(self, name: str, patience: float = 10.0) -> Client:
        """A connection to a vdev that has said nothing yet."""
        return Client.connect(self.folder / "dir" / f"{name}.sock", patience)

    def wait(self, condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
        """Until ``condition()``; AssertionError with ``what`` and the log when it does not come."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"it has ended: {self.log[-3000:]}"
            assert time.monotonic() < deadline, f"{what}: {self.log[-3000:]}"
            time.sleep(0.01)

    def open_files(self) -> Counter[str]:
        """What its descriptors are, by kind."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        kinds: Counter[str] = Counter()
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                kinds[str(path.readlink()).split(":[")[0]] += 1
        return kinds

    def settle(self) -> None:
        """Every client has gone: what they brought is gone, too, and nothing went wrong inside."""
        try:
            self.wait(
                # Fewer: a vdev that was used has ended, and the next one begins with its client.
                lambda: self.fds() <= self.idle[0] and self.threads() <= self.idle[1] and not self.mapped(),
                "something is left",
            )
        except AssertionError as error:
            more, fewer = self.open_files() - self.files, self.files - self.open_files()
            now = f"{self.threads()} of {self.idle[1]} threads, {self.mapped()} maps"
            raise AssertionError(f"{now}; descriptors: more {more}, fewer {fewer}: {error}") from error
        assert "Traceback" not in self.log, self.log[-3000:]

    def check_alive(self) -> None:
        """It serves: a new client of the plainest device gets what it asks for."""
        assert self.process.poll() is None, self.log[-3000:]
        with self.client("hello0") as client:
            client.version()
            assert client.read(0, 0, 4) == int.from_bytes(b"helo", "little")

    def check_entropy(self) -> None:
        """A driver of ``rng0`` gets random numbers, and leaves nothing."""
        with Guest(self, "rng0") as guest:
            driver = guest.driver()
            driver.start()
            request = driver.queues[0].submit([], [16])
            assert guest.reap(driver.queues[0]) == [request] and request.result() != bytes(16)
        self.settle()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; its exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Guest:
    """A guest with shared memory and one of the devices, enumerated. A context manager."""

    def __init__(self, serving: Serving, name: str, *, posted: bool = True) -> None:
        self.client = serving.client(name)
        self.memory = GuestMemory.allocate(RAM)
        self.irq = FakeIrq()
        self.remote: RemoteFunction | None = None
        try:
            self.client.version()
            self.remote = RemoteFunction(self.client, self.irq, posted=posted, aperture=BASE)
            self.remote.share(self.memory.regions)
            self.device = self.remote.device
            self.device.enumerate()
        except BaseException:
            self.close()
            raise
        self.base = self.device.bars[0][0] if self.device.bars else 0

    def driver(self) -> PciDriver:
        """A virtio driver that has not begun."""
        assert self.remote is not None
        return PciDriver(self.remote, self.device, GuestRam(self.memory))

    def reap(self, ring: Any, timeout: float = 10.0) -> list[Any]:
        """Wait for the next interrupts until something has come back; it."""
        deadline = time.monotonic() + timeout
        while not (done := ring.reap()):
            assert time.monotonic() < deadline, "the device does not answer"
            time.sleep(0.001)
        return list(done)

    def vanish(self) -> None:
        """Drop the connection, as a VMM that was killed."""
        self.client.close()

    def close(self) -> None:
        """Leave."""
        self.client.close()
        if self.remote is not None:
            self.remote.close()
        self.memory.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
