"""``qvm serve`` as its user meets it: a process, its sockets, its messages, its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import importlib_metadata
import pytest

from qvmcore.cli import main
from qvmcore.plugins import PluginHost

PLUGIN = """
from qvmcore.api import HostError, Vdev, Window

class Lamp(Vdev):
    vdev_type = "lamp"
    summary = "shines"
    windows = (Window(0x20),)

class Ghost(Vdev):
    vdev_type = "ghost"
    summary = "has no registers"

class Broken(Vdev):
    vdev_type = "broken"
    summary = "cannot be had"
    windows = (Window(0x20),)
    def on_configured(self):
        raise HostError("cannot open the bulb", hint="buy one")

class Session:
    def __init__(self, served):
        self.served = served
    def serve(self, connection):
        with connection.makefile("rw") as lines:
            for line in lines:
                self.served.used = True
                lines.write(f"{self.served.name}: {line}")
                lines.flush()

class Lines:
    name = "lines"
    pci = False
    def refusal(self, cls):
        return "" if cls.windows else "it has no registers"
    def bind(self, served):
        return Session(served)
    def attach_lines(self, vdev, path):
        return [("netcat", f"nc -U {path}")]

class Words(Lines):
    name = "words"

def qvm_vdev_types():
    return [Lamp, Ghost, Broken]

def qvm_servers():
    return [Lines, Words]
"""

ENTRY_POINTS = """\
[qvm.vdev.v1]
lamp = fake_lamps
ghost = fake_lamps
broken = fake_lamps
[qvm.server.v1]
lines = fake_lamps
words = fake_lamps
"""

LAMPS = """\
[system]
name = "lamps"

[[vdev]]
type = "lamp"
name = "left"

[[vdev]]
type = "lamp"
name = "right"
"""


class Serving:
    """One ``qvm`` process with the fake plugin, in ``folder``; it may open so many ``files``, if given."""

    def __init__(self, folder: Path, *args: str, files: int = 0) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), *sys.path[1:]]),
            "XDG_RUNTIME_DIR": str(folder / "run"),
        }
        env.pop("QVM_DEBUG", None)
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qvmcore", *args],
            cwd=folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=(lambda: _limit(files)) if files else None,
        )
        self.out = self.err = ""

    def serving(self, *names: str) -> Serving:
        """Wait until it has said where the last of ``names`` is."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + 20
        last = f"nc -U {self.folder}/dir/{names[-1]}.sock\n"
        while last not in self.out:
            poll = select.poll()
            poll.register(self.process.stdout, select.POLLIN)
            ready = poll.poll(1000 * max(0, deadline - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                self.end(signal.SIGKILL)
                raise AssertionError(f"it does not serve {names}: {self.out}{self.err}")
            self.out += piece.decode()
        return self

    def end(self, number: signal.Signals | None = signal.SIGTERM) -> int:
        """Send a signal, unless None; the exit code, with ``out`` and ``err`` read to their ends."""
        if number is not None:
            self.process.send_signal(number)
        out, self.err = self.process.communicate(timeout=20)
        self.out += out
        return self.process.returncode

    def client(self, name: str) -> socket.socket:
        """A connection to a vdev."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(10)
        client.connect(str(self.folder / "dir" / f"{name}.sock"))
        return client


def _limit(files: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


Start = Callable[..., Serving]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(*args)`` runs qvm in a folder with ``lamps.toml`` and an installed plugin."""
    info = tmp_path / "site" / "qvm_lamps-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qvm-lamps\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "site" / "fake_lamps.py").write_text(PLUGIN)
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "lamps.toml").write_text(LAMPS)
    with contextlib.ExitStack() as stack:

        def make(*args: str, files: int = 0) -> Serving:
            serving = Serving(tmp_path, *args, files=files)
            stack.callback(_clean, serving.process)
            return serving

        yield make


def _clean(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def ask(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text + b"\n")
    return client.recv(100)


def failure(start: Start, *args: str, files: int = 0) -> tuple[int, str]:
    """Exit code and message of a server that must not start; nothing on stdout, no traceback."""
    serving = start("serve", *args, files=files)
    code = serving.end(None)
    assert serving.out == "" and "Traceback" not in serving.err and "internal error" not in serving.err
    return code, serving.err


# ---- it serves ---------------------------------------------------------------------------------------


def test_it_says_where_each_vdev_is_and_how_to_attach_it(start: Start, tmp_path: Path) -> None:
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("left", "right")
    assert serving.out == (
        f"left (lamp) at {tmp_path}/dir/left.sock\n  netcat:\n    nc -U {tmp_path}/dir/left.sock\n"
        f"right (lamp) at {tmp_path}/dir/right.sock\n  netcat:\n    nc -U {tmp_path}/dir/right.sock\n"
    )
    with serving.client("left") as left, serving.client("right") as right:
        assert [ask(left, b"on"), ask(right, b"off")] == [b"left: on\n", b"right: off\n"]
    assert (tmp_path / "dir").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_ends_it_with_clients_connected(start: Start, tmp_path: Path, number: str) -> None:
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    with serving.client("left") as busy, serving.client("right") as idle:
        assert ask(busy, b"on") == b"left: on\n"
        assert ask(idle, b"off") == b"right: off\n"
        assert serving.end(signal.Signals[number]) == 0
        assert busy.recv(1) == idle.recv(1) == b""
    assert list((tmp_path / "dir").iterdir()) == []
    assert "Traceback" not in serving.err and f"{number}: ending" in serving.err
    assert list((tmp_path / "run" / "qvm").iterdir()) == []


def test_board_memory_and_kernel_may_be_there_and_mean_nothing(start: Start, tmp_path: Path) -> None:
    (tmp_path / "lamps.toml").write_text(
        LAMPS.replace("[system]", '[system]\nboard = "x86_64-pc"\nram = "1G"\nengine = "kvm"')
        + '\n[load]\nkernel = "missing"\n'
    )
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("left", "right")
    assert serving.end() == 0


def test_vdevs_that_the_protocol_cannot_carry_are_named_and_left_out(start: Start, tmp_path: Path) -> None:
    (tmp_path / "lamps.toml").write_text(LAMPS + '\n[[vdev]]\ntype = "ghost"\nname = "boo"\n')
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    assert not (tmp_path / "dir" / "boo.sock").exists()
    assert serving.end() == 0
    assert "boo (ghost) is not served: it has no registers" in serving.err


def test_status_while_serving(start: Start) -> None:
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    with serving.client("left") as client:
        ask(client, b"on")
        (row,) = json.loads(_status(start, "--json"))
        assert (row["name"], row["pid"], row["state"]) == ("lamps", serving.process.pid, "serving")
        report = json.loads(_status(start, "lamps", "--json"))
        assert [vdev["name"] for vdev in report["vdevs"]] == ["left", "right"]
        assert report["guest"]["status"]["clients"] == {"left": True, "right": False}
        assert "left" in _status(start, "lamps") and "serving" in _status(start)
    assert serving.end() == 0
    assert json.loads(_status(start, "--json")) == []


def _status(start: Start, *args: str) -> str:
    asked = start("status", *args)
    assert asked.end(None) == 0, asked.err
    return asked.out


def test_sigusr1_logs_the_state_and_sigusr2_does_no_harm(start: Start) -> None:
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    serving.process.send_signal(signal.SIGUSR1)
    serving.process.send_signal(signal.SIGUSR2)
    with serving.client("left") as client:
        assert ask(client, b"on") == b"left: on\n"
    time.sleep(0.2)
    assert serving.end() == 0
    assert "status:" in serving.err and "SIGUSR2" in serving.err


def test_nobody_reads_what_it_prints(start: Start, tmp_path: Path) -> None:
    """``qvm serve ... | head -1``: the message is lost, not the devices."""
    serving = start("serve", "lamps.toml", "--lines", "dir")
    assert serving.process.stdout is not None
    serving.process.stdout.close()
    serving.process.stdout = None
    deadline = time.monotonic() + 20
    while not (tmp_path / "dir" / "right.sock").exists():
        assert time.monotonic() < deadline and serving.process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    with serving.client("left") as client:
        assert ask(client, b"on") == b"left: on\n"
    assert serving.process.poll() is None
    serving.process.send_signal(signal.SIGTERM)
    _, err = serving.process.communicate(timeout=20)
    assert serving.process.returncode == 0 and "Traceback" not in err and "Exception ignored" not in err


# ---- its directory ------------------------------------------------------------------------------------


def test_a_stale_socket_is_replaced(start: Start, tmp_path: Path) -> None:
    first = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    first.end(signal.SIGKILL)
    assert (tmp_path / "dir" / "left.sock").is_socket()
    second = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    with second.client("left") as client:
        assert ask(client, b"on") == b"left: on\n"
    assert second.end() == 0


def test_a_socket_in_use_is_left_to_its_server(start: Start, tmp_path: Path) -> None:
    first = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    with first.client("left") as client:
        code, err = failure(start, "lamps.toml", "--lines", "dir")
        assert code == 64
        assert f"{tmp_path}/dir/left.sock is served by another process; end it, or take another dir" in err
        assert ask(client, b"on") == b"left: on\n"
    with first.client("right") as client:
        assert ask(client, b"on") == b"right: on\n"
    assert first.end() == 0


def test_the_second_socket_in_use_leaves_the_first_as_it_was(start: Start, tmp_path: Path) -> None:
    """A server that cannot have all of its sockets takes back those it has made."""
    (tmp_path / "other.toml").write_text(LAMPS.replace("left", "middle"))
    first = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    code, err = failure(start, "other.toml", "--lines", "dir")
    assert code == 64 and "right.sock is served by another process" in err
    assert sorted(path.name for path in (tmp_path / "dir").iterdir()) == ["left.sock", "right.sock"]
    assert first.end() == 0


def test_a_file_in_the_way_is_kept(start: Start, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "left.sock").write_text("mine")
    code, err = failure(start, "lamps.toml", "--lines", "dir")
    assert code == 64 and "left.sock exists and is no socket; remove it, or take another directory" in err
    assert (tmp_path / "dir" / "left.sock").read_text() == "mine"


def test_a_directory_nobody_may_write_to(start: Start, tmp_path: Path) -> None:
    """Root may write anywhere but to a file system that has no room for sockets."""
    if os.geteuid() == 0:
        folder = Path("/proc")
    else:
        folder = tmp_path / "dir"
        folder.mkdir(mode=0o500)
    code, err = failure(start, "lamps.toml", "--lines", str(folder))
    assert code == 64 and f"cannot make the socket {folder}/left.sock: " in err


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("none/dir", "cannot make the directory none/dir: No such file or directory"),
        ("lamps.toml", "Directory 'lamps.toml' is a file"),
        ("lamps.toml/dir", "cannot make the directory lamps.toml/dir: Not a directory"),
        ("d" * 120, "bytes are too long for the path of a socket; take a directory with a shorter path"),
        ("", "--lines: dir is empty"),
    ],
    ids=["no-parent", "file", "below-a-file", "too-long", "empty"],
)
def test_a_directory_that_cannot_be(start: Start, folder: str, message: str) -> None:
    code, err = failure(start, "lamps.toml", "--lines", folder)
    assert code == 64 and message in err.replace("DIR", "dir")


def test_a_directory_that_vanishes_does_not_stop_the_end(start: Start, tmp_path: Path) -> None:
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    (tmp_path / "dir").rename(tmp_path / "gone")
    assert serving.end() == 0 and "Traceback" not in serving.err


def test_a_socket_somebody_else_has_put_there_is_left(start: Start, tmp_path: Path) -> None:
    serving = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    path = tmp_path / "dir" / "left.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        assert serving.end() == 0
        assert path.is_socket()


def test_two_servers_of_one_name_in_two_directories(start: Start, tmp_path: Path) -> None:
    first = start("serve", "lamps.toml", "--lines", "dir").serving("right")
    second = start("serve", "lamps.toml", "--lines", "more")
    deadline = time.monotonic() + 20
    while not (tmp_path / "more" / "right.sock").exists():
        assert time.monotonic() < deadline and second.process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    assert [row["name"] for row in json.loads(_status(start, "--json"))] == ["lamps", "lamps.2"]
    assert [first.end(), second.end()] == [0, 0]


# ---- wrong input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ('"lamp"\nname = "left"', '"lmap"\nname = "left"', 65, "did you mean 'lamp'?"),
        ('"lamp"\nname = "left"', '"zzz"\nname = "left"', 65, "unknown vdev type 'zzz'; installed: "),
        ("left", "right", 65, "right"),
        ("left", "a/b", 65, "a/b"),
        ("left", ".." , 65, ".."),
        ("lamp\"", "ghost\"", 64, "nothing to serve over lines"),
        (LAMPS, "", 64, "nothing to serve over lines"),
        ('"lamp"\nname = "left"', '"broken"\nname = "left"', 64, "cannot open the bulb; buy one"),
        ('"lamp"\nname = "right"', '"broken"\nname = "right"', 64, "cannot open the bulb; buy one"),
        ('name = "left"', 'nme = "left"', 65, "nme"),
        ("[system]", "[system", 65, "lamps.toml:1"),
    ],
    ids=["mistyped", "unknown", "twice", "slash", "dots", "unservable", "empty", "broken", "second-broken",
         "key", "syntax"],
)  # fmt: skip
def test_a_wrong_file(start: Start, tmp_path: Path, old: str, new: str, code: int, message: str) -> None:
    (tmp_path / "lamps.toml").write_text(LAMPS.replace(old, new))
    assert old in LAMPS
    got, err = failure(start, "lamps.toml", "--lines", "dir")
    assert got == code and message in err
    assert not (tmp_path / "dir").exists() or list((tmp_path / "dir").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 64, "say over which protocol"),
        (("--lines", "a", "--words", "b"), 64, "serve over one protocol at a time"),
        (("--lines",), 64, "requires an argument"),
        (("--line", "dir"), 64, "--lines"),
        (("--lines", "dir", "--set", "nonsense"), 65, "nonsense"),
        (("--lines", "dir", "none.toml"), 65, "none.toml"),
    ],
    ids=["neither", "both", "no-directory", "mistyped", "set", "no-file"],
)
def test_a_wrong_command_line(start: Start, args: tuple[str, ...], code: int, message: str) -> None:
    got, err = failure(start, "lamps.toml", *args)
    assert (got, message in err) == (code, True), err


@pytest.mark.parametrize("files", [5, 6, 7])
def test_too_few_file_descriptors_are_named_with_their_limit(start: Start, files: int) -> None:
    """Wherever the last one is taken: no bug, but a limit of the host."""
    code, err = failure(start, "lamps.toml", "--lines", "dir", files=files)
    assert code == 64
    assert err.splitlines()[-1].endswith(
        f"; this process may have {files} (hard limit {files}): raise that with ulimit -n in its shell, "
        "or LimitNOFILE= in its systemd unit"
    )


def test_without_a_file(start: Start) -> None:
    code, err = failure(start, "--lines", "dir")
    assert code == 64 and "FILE" in err


def test_a_server_that_is_not_installed(start: Start, tmp_path: Path, capfd: Any) -> None:
    """The option of a server that comes with a known distribution says which."""
    info = tmp_path / "site" / "qvm_lamps-1.0.dist-info"
    start  # noqa: B018 - the fixture makes the distribution
    host = PluginHost([importlib_metadata.PathDistribution(info)])
    for option in ("--vhost-user", "--vfio-user"):
        assert main(["serve", "lamps.toml", option, "dir"], host=host) == 64
        err = capfd.readouterr().err
        assert f"pip install qvm-{option[2:]}" in err and "Traceback" not in err


def test_no_server_at_all(start: Start, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start  # noqa: B018 - the fixture makes the files
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "lamps.toml"], host=PluginHost(distributions=())) == 64
    assert "no server is installed; pip install qvm-vhost-user" in capfd.readouterr().err
