"""Files, FIFOs, commands, pseudo-terminals and Unix sockets as character devices."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
import tty
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from qvm_chardev import channel
from qvm_chardev.testing import Owner, wait_for

from qvmcore.api import HostError


def test_output_file_is_emptied_or_appended_to(owner: Owner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old ")
    line = owner.open(">>log")
    assert line.write(b"more") == 4
    line.close()
    assert log.read_text() == "old more"
    line = owner.open("> log")
    assert line.write(memoryview(b"new")) == 3
    assert line.status() == {"hostdev": str(log), "received": 0, "sent": 3, "dropped": 0}
    line.close()
    assert log.read_text() == "new"


def test_a_full_disk_drops_output_and_says_so_once(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    line = owner.open(">/dev/full")
    assert [line.write(b"abc") for _ in range(3)] == [3, 3, 3]
    assert wait_for(lambda: "No space left" in caplog.text)
    assert line.status()["dropped"] == 9
    assert caplog.text.count("No space left") == 1
    line.close()


def test_input_file_and_pause(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"z" * 10_000)
    line = owner.open("<in")
    assert wait_for(lambda: len(owner.input) == 10_000)
    assert line.write(b"nowhere") == 7 and line.status()["dropped"] == 7
    line.pause_input()
    line.close()


def test_fifo_both_ways_without_a_peer(owner: Owner, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    os.mkfifo(tmp_path / "out")
    source, target = owner.open("<in"), owner.open(">out")
    writer = os.open(tmp_path / "in", os.O_WRONLY)
    os.write(writer, b"hi")
    os.close(writer)
    assert wait_for(lambda: owner.input == b"hi")
    assert target.write(b"ho") == 2
    reader = os.open(tmp_path / "out", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 10) == b"ho"
    os.close(reader)
    source.close()
    target.close()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("<inptu", "did you mean 'input'"),
        ("stdoi", "did you mean 'stdio'"),
        ("<no/such/in", "there is no directory"),
        ("input", "both input and output"),
        (">.", "directory"),
        (">|/no/such/command", "cannot start"),
        (">|'", "command"),
        ("unix:input", "is no socket"),
        ("unix:no/such/dir/x", "cannot listen"),
        ("unix:" + "x" * 200, "longer than"),
        ("pty:input", "cannot make the link"),
    ],
)
def test_what_cannot_be_opened_is_explained(owner: Owner, tmp_path: Path, spec: str, said: str) -> None:
    (tmp_path / "input").write_text("")
    with pytest.raises(HostError, match=said):
        owner.open(spec)
    assert (tmp_path / "input").read_text() == ""


def test_command_gets_the_output_and_its_end(owner: Owner, tmp_path: Path) -> None:
    code = "import sys; open('got', 'wb').write(sys.stdin.buffer.read())"
    line = owner.open(f'>|{sys.executable} -c "{code}"')
    assert line.write(b"hello") == 5
    line.close()
    assert (tmp_path / "got").read_bytes() == b"hello"


def test_a_command_that_stays_is_killed(owner: Owner) -> None:
    line = owner.open(">|sleep 60")
    started = time.monotonic()
    line.close()
    line.close()
    assert time.monotonic() - started < 5


def test_pty_link_client_and_reconnect(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("pty:con")
    link = tmp_path / "con"
    assert line.write(b"nobody") == 6 and line.status()["dropped"] == 6
    for round_ in (b"one", b"two"):
        fd = os.open(link, os.O_RDWR | os.O_NOCTTY)
        assert wait_for(lambda: line.status()["connected"])
        os.write(fd, round_)
        assert wait_for(partial(owner.input.endswith, round_))
        assert line.write(b"out\n") == 4
        assert wait_for(lambda: line.status()["sent"])
        assert os.read(fd, 10) == b"out\n"
        os.close(fd)
        assert wait_for(lambda: not line.status()["connected"])
    line.close()
    assert not link.is_symlink()


def test_pty_passes_every_byte(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("pty:con")
    fd = os.open(tmp_path / "con", os.O_RDWR | os.O_NOCTTY)
    assert wait_for(lambda: line.status()["connected"])
    os.write(fd, bytes(range(256)))
    assert wait_for(lambda: bytes(owner.input) == bytes(range(256)))
    line.write(bytes(range(256)))
    assert wait_for(lambda: line.status()["sent"] == 256)
    assert os.read(fd, 1000) == bytes(range(256))
    os.close(fd)
    line.close()


def test_pty_client_that_stops_reading_holds_the_guest_back(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("pty:con")
    fd = os.open(tmp_path / "con", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    assert wait_for(lambda: line.status()["connected"])
    while line.write(b"w" * 10_000):
        pass
    os.close(fd)
    assert wait_for(lambda: owner.writable)
    assert line.write(b"gone") == 4
    line.close()


@pytest.mark.parametrize("spec", ["unix:line", "pty:line"])
def test_the_owner_is_told_of_clients(owner: Owner, tmp_path: Path, spec: str) -> None:
    line = owner.open(spec)
    for _ in range(2):
        owner.connections.clear()
        if spec.startswith("unix"):
            client = _connect(tmp_path / "line")
        else:
            client = os.fdopen(os.open(tmp_path / "line", os.O_RDWR | os.O_NOCTTY), "rb", buffering=0)
        assert wait_for(lambda: owner.connections == [True])
        client.close()
        assert wait_for(lambda: owner.connections == [True, False])
    line.close()


def test_a_lossless_line_waits_for_a_receiver_that_takes_nothing(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "STALL_SECONDS", 0.02)
    lines = [owner.open(f"unix:{name}", lossless=name == "kept") for name in ("lost", "kept")]
    clients = [_connect(tmp_path / name) for name in ("lost", "kept")]
    for line in lines:
        assert wait_for(lambda line=line: line.status()["connected"])
        while line.write(bytes(10_000)) == 10_000:
            pass
    assert wait_for(lambda: lines[0].write(b"x") == 1 and lines[0].status()["dropped"])
    assert lines[1].write(b"x") == 0 and not lines[1].status()["dropped"]
    for each in (*clients, *lines):
        each.close()


def _connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(5)
    client.connect(str(path))
    return client


def test_socket_client_mode_reconnect_and_unlink(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("unix:s")
    path = tmp_path / "s"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for word in (b"first", b"second"):
        with _connect(path) as client:
            assert wait_for(lambda: line.status()["connected"])
            client.send(word)
            assert wait_for(partial(owner.input.endswith, word))
            line.write(b"answer")
            assert client.recv(10) == b"answer"
        assert wait_for(lambda: not line.status()["connected"])
    assert line.write(b"nobody") == 6 and line.status()["dropped"] == 6
    line.close()
    line.close()
    assert not path.exists()


def test_a_second_client_is_told_and_the_first_stays(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("unix:s")
    with _connect(tmp_path / "s") as first:
        assert wait_for(lambda: line.status()["connected"])
        with _connect(tmp_path / "s") as second:
            assert second.recv(100) == b"con0 is in use by another client\r\n"
        line.write(b"still yours")
        assert first.recv(100) == b"still yours"
    line.close()


def test_a_client_that_only_finished_sending_still_gets_the_answer(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("unix:s")
    with _connect(tmp_path / "s") as client:
        client.send(b"ls\n")
        client.shutdown(socket.SHUT_WR)
        assert wait_for(lambda: owner.input == b"ls\n")
        time.sleep(0.05)
        line.write(b"files")
        assert client.recv(10) == b"files"
    with _connect(tmp_path / "s") as client:
        client.send(b"next")
        assert wait_for(lambda: owner.input.endswith(b"next"))
        line.write(b"for the next")
        assert client.recv(20) == b"for the next"
    line.close()


def test_input_stays_in_the_socket_while_paused_across_clients(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("unix:s")
    line.pause_input()
    with _connect(tmp_path / "s") as client:
        client.send(b"wait")
        time.sleep(0.05)
        assert not owner.input
        line.resume_input()
        assert wait_for(lambda: owner.input == b"wait")
    line.close()


def test_the_stale_socket_of_a_killed_process_is_replaced(owner: Owner, tmp_path: Path) -> None:
    code = (
        "import os, signal, socket\n"
        "s = socket.socket(socket.AF_UNIX); s.bind('s'); s.listen()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert (tmp_path / "s").is_socket()
    line = owner.open("unix:s")
    with _connect(tmp_path / "s"):
        assert wait_for(lambda: line.status()["connected"])
    line.close()


def test_a_live_socket_is_refused_and_survives(owner: Owner, tmp_path: Path) -> None:
    first = owner.open("unix:s")
    with pytest.raises(HostError, match="another process listens"):
        owner.open("unix:s")
    with _connect(tmp_path / "s"):
        assert wait_for(lambda: first.status()["connected"])
    first.close()


def test_a_live_socket_too_busy_to_answer_is_not_stale(owner: Owner, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(path)
        with pytest.raises(HostError, match="another process listens"):
            owner.open("unix:s")
        assert (tmp_path / "s").is_socket()


def test_close_leaves_a_node_that_is_not_ours(owner: Owner, tmp_path: Path) -> None:
    line = owner.open("unix:s")
    (tmp_path / "s").unlink()
    (tmp_path / "s").write_text("somebody else's")
    line.close()
    assert (tmp_path / "s").read_text() == "somebody else's"


def test_null(owner: Owner) -> None:
    line = owner.open("null")
    assert line.write(b"x" * 100) == 100 and line.flush(0) and line.size() is None
    assert line.status()["dropped"] == 100
    line.close()


def test_an_idle_pty_and_socket_cost_next_to_nothing(owner: Owner) -> None:
    lines = [owner.open("pty"), owner.open("unix:s")]
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.03
    for line in lines:
        line.close()
