"""Servers for foreign clients, and the clients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.foreign import uml as user_mode_linux
from tests.foreign.uml import Uml

ROOT = Path(__file__).resolve().parents[2]
#: Seconds until a server has made its sockets, or has ended.
LIMIT = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder that start a whole machine count as guest tests."""
    for item in items:
        if ROOT / "tests" / "foreign" in item.path.parents and {"uml", "serve"} & set(
            getattr(item, "fixturenames", ())
        ):
            item.add_marker("guest")


@dataclass
class Serving:
    """A server's process; its sockets are in ``folder``, what it says goes to ``log``."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def socket(self, name: str) -> Path:
        """The socket of a device."""
        return self.folder / f"{name}.sock"

    def status(self, name: str) -> dict[str, Any]:
        """What ``qvm status`` tells of a vdev."""
        words = [sys.executable, "-m", "qvmcore", "status", "--json", str(self.process.pid)]
        done = subprocess.run(words, check=True, capture_output=True)
        vdevs = {each["name"]: each["status"] for each in json.loads(done.stdout)["vdevs"]}
        return dict(vdevs[name])

    def until(self, condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
        """Wait for it; fails, also when the server ends, with all it said."""
        deadline = time.monotonic() + limit
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{what}: not so (exit {self.process.poll()}); the server said:\n{self.text}")
            time.sleep(0.02)

    def expect(self, pattern: str, limit: float = LIMIT) -> None:
        """Wait for a pattern in what it says."""
        self.until(lambda: re.search(pattern, self.text), f"{pattern!r} in its log", limit)

    def stop(self) -> None:
        """SIGTERM; it ends well and takes its sockets with it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server does not end; it said:\n{self.text}")
        assert code == 0, self.text
        assert not re.search("warning|error|Traceback", self.text), self.text
        assert not list(self.folder.glob("*.sock")), self.text


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: a socket's address has 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="qvm-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run_server(short: Path) -> Iterator[Callable[..., Serving]]:
    """``run_server(folder, [program, ...], ["disk0", ...])``: start it, wait for sockets in ``folder``."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path, words: list[str], names: list[str]) -> Serving:
            folder.mkdir(exist_ok=True)
            log = short / f"{folder.name}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            serving = Serving(process, folder, log)
            stack.callback(end, serving)
            serving.until(lambda: all(serving.socket(name).exists() for name in names), "sockets")
            return serving

        yield start


def end(serving: Serving) -> None:
    """Whatever still runs of it is stopped; a server that the test did not end has to end well."""
    try:
        if serving.process.poll() is None:
            serving.stop()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(serving.process.pid, signal.SIGKILL)
        serving.process.wait()
        # pytest shows it with a test that failed.
        print(serving.text)


@pytest.fixture
def serve(run_server: Callable[..., Serving], short: Path, tmp_path: Path) -> Callable[..., Serving]:
    """``serve("[[vdev]]...", "disk0", ...)``: ``qvm serve`` with this VM file and sockets of these names.

    ``prefix`` are words before the command, of a program that becomes it.
    """

    def start(
        vdevs: str, *names: str, protocol: str = "vhost-user", system: str = "s", prefix: Sequence[str] = ()
    ) -> Serving:
        file = tmp_path / f"{system}.toml"
        file.write_text(f'[system]\nname = "{system}"\n{vdevs}')
        folder = short / system
        words = [sys.executable, "-m", "qvmcore", "serve", str(file), f"--{protocol}", str(folder)]
        return run_server(folder, [*prefix, *words], list(names))

    return start


@pytest.fixture
def uml() -> Iterator[Callable[..., Uml]]:
    """``uml(script, [(socket, id)], modules="...")``: a running UML (see uml.py); none outlives the test."""
    if why := user_mode_linux.missing():
        pytest.skip(why)
    running: list[Uml] = []

    def start(*arguments: Any, **options: Any) -> Uml:
        running.append(Uml(*arguments, **options))
        return running[-1]

    yield start
    for each in running:
        each.close()
