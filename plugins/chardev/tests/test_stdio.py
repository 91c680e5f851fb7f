"""The terminal: raw mode restored on every way out, escape key, size, pipes and files as stdio."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qvm_chardev import stdio
from qvm_chardev.channel import Channel
from qvm_chardev.rawmode import RawMode
from qvm_chardev.stdio import Stdio
from qvm_chardev.testing import Owner, wait_for

from qvmcore.api import HostError


@pytest.fixture
def tty() -> Iterator[tuple[int, int]]:
    """(the person's side, qvm's side) of a terminal."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    yield master, slave
    os.close(master)
    os.close(slave)


def _open(owner: Owner, fd: int, **arguments: Any) -> Stdio:
    return Stdio(owner.wiring(), reads=True, writes=True, input_fd=fd, output_fd=fd, **arguments)


def _is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def _type(master: int, data: bytes) -> None:
    os.write(master, data)


def test_raw_while_open_and_restored_by_close(owner: Owner, tty: tuple[int, int]) -> None:
    before = termios.tcgetattr(tty[1])
    line = _open(owner, tty[1])
    assert _is_raw(tty[1])
    line.close()
    assert termios.tcgetattr(tty[1]) == before
    line.close()


def test_restored_when_opening_fails_half_way(
    owner: Owner, tty: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = termios.tcgetattr(tty[1])
    seen_raw = []

    def broken(self: object) -> None:
        seen_raw.append(_is_raw(tty[1]))
        raise OSError("no epoll")

    monkeypatch.setattr(Channel, "start", broken)
    with pytest.raises(OSError, match="no epoll"):
        _open(owner, tty[1])
    assert seen_raw == [True]
    assert termios.tcgetattr(tty[1]) == before


def test_raw_mode_returns_after_a_shell_took_the_terminal_back(owner: Owner, tty: tuple[int, int]) -> None:
    before = termios.tcgetattr(tty[1])
    line = _open(owner, tty[1])
    termios.tcsetattr(tty[1], termios.TCSANOW, before)
    assert wait_for(lambda: _is_raw(tty[1]), 3)
    line.close()
    assert termios.tcgetattr(tty[1]) == before


def test_raw_mode_is_never_entered_after_it_was_left(tty: tuple[int, int]) -> None:
    mode = RawMode(tty[1])
    mode.enter()
    mode.leave()
    mode.enter()
    assert not _is_raw(tty[1])


def test_keys_reach_the_guest_control_c_too(owner: Owner, tty: tuple[int, int]) -> None:
    line = _open(owner, tty[1])
    _type(tty[0], b"ls\r\x03\x1a\x11")
    assert wait_for(lambda: owner.input == b"ls\r\x03\x1a\x11")
    line.close()


def test_output_reaches_the_person(owner: Owner, tty: tuple[int, int]) -> None:
    line = _open(owner, tty[1])
    assert line.write(b"login: ") == 7
    assert os.read(tty[0], 100) == b"login: "
    line.close()


def test_escape_key_works_while_the_guest_reads_nothing(
    owner: Owner, tty: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio, "TICK_SECONDS", 60)
    line = _open(owner, tty[1])
    line.pause_input()
    _type(tty[0], b"typed ahead")
    _type(tty[0], b"\x01p\x01x")
    assert wait_for(lambda: owner.presses == 1 and owner.quits == 1)
    assert not owner.input
    line.resume_input()
    assert wait_for(lambda: owner.input == b"typed ahead")
    line.close()


def test_type_ahead_is_bounded_and_counted(owner: Owner, tty: tuple[int, int]) -> None:
    line = _open(owner, tty[1])
    line.pause_input()
    for _ in range(8):
        _type(tty[0], b"k" * 1000)
        time.sleep(0.02)
    assert wait_for(lambda: line.status()["received"] == 8000)
    assert line.status()["dropped"] == 8000 - stdio.TYPE_AHEAD
    line.resume_input()
    assert wait_for(lambda: len(owner.input) == stdio.TYPE_AHEAD)
    line.close()


def test_escape_help_is_printed(owner: Owner, tty: tuple[int, int]) -> None:
    line = _open(owner, tty[1])
    _type(tty[0], b"\x01h")
    time.sleep(0.1)
    assert b"Ctrl-A x" in os.read(tty[0], 1000)
    line.close()


def test_without_an_escape_key_everything_is_the_guests(owner: Owner, tty: tuple[int, int]) -> None:
    line = Stdio(owner.wiring(escape=False), reads=True, writes=True, input_fd=tty[1], output_fd=tty[1])
    _type(tty[0], b"\x01x")
    assert wait_for(lambda: owner.input == b"\x01x")
    assert not owner.quits
    line.close()


def test_size_and_its_change(owner: Owner, tty: tuple[int, int]) -> None:
    fcntl.ioctl(tty[1], termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    line = _open(owner, tty[1])
    assert line.size() == (80, 24) and not owner.resized
    fcntl.ioctl(tty[1], termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    assert wait_for(lambda: owner.resized == 1, 3)
    assert line.size() == (132, 50)
    line.close()


def test_a_hung_up_terminal_is_survived(owner: Owner) -> None:
    master, slave = os.openpty()
    line = _open(owner, slave)
    os.close(master)
    time.sleep(0.1)
    assert line.write(b"x") == 1
    line.close()
    os.close(slave)


def test_terminal_refuses_a_pipe(owner: Owner) -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(HostError, match=r"no terminal.*stdio"):
        Stdio(owner.wiring(), reads=True, writes=True, terminal=True, input_fd=read_end, output_fd=write_end)
    os.close(read_end)
    os.close(write_end)


def test_regular_files_as_stdio(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"scripted input" * 1000)
    source = os.open(tmp_path / "in", os.O_RDONLY)
    target = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    os.write(target, b"before ")
    line = Stdio(owner.wiring(), reads=True, writes=True, input_fd=source, output_fd=target)
    assert line.write(b"after") == 5
    assert wait_for(lambda: len(owner.input) == 14000)
    line.close()
    os.close(source)
    os.close(target)
    assert (tmp_path / "out").read_bytes() == b"before after"


def test_dev_null_and_closed_descriptors_as_stdio(owner: Owner) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    line = Stdio(owner.wiring(), reads=True, writes=True, input_fd=null, output_fd=null)
    assert line.write(b"abc") == 3
    line.close()
    os.close(null)
    nobody = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1  # too high to be open by chance
    closed = Stdio(owner.wiring(), reads=True, writes=True, input_fd=nobody, output_fd=nobody)
    assert closed.write(b"abc") == 3 and closed.status()["dropped"] == 3
    closed.close()


_CHILD = """
    import logging, os, sys, termios, time
    from pathlib import Path
    from qvm_chardev import open_chardev
    from qvmcore.api import Worker
    worker = Worker("w", print)
    line = open_chardev("stdio", worker=worker, on_input=lambda data: None, log=logging.getLogger(), name="c")
    print("raw" if not termios.tcgetattr(0)[3] & termios.ICANON else "cooked", file=sys.stderr, flush=True)
    time.sleep(float(sys.argv[1]))
    line.close()
"""


def test_a_background_process_neither_stops_nor_touches_the_terminal(tty: tuple[int, int]) -> None:
    """As under `timeout 10 qvm run`: controlling terminal, but another group in the foreground."""
    wrapper = f"""
        import os, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {textwrap.dedent(_CHILD)!r}, "0.3"],
                                 process_group=0, stderr=subprocess.PIPE)
        said = child.stderr.read().decode()
        sys.exit(0 if child.wait() == 0 and "cooked" in said else 1)
    """

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    before = termios.tcgetattr(tty[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(wrapper)],
        stdin=tty[1], stdout=tty[1], preexec_fn=own_terminal, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert termios.tcgetattr(tty[1]) == before


def test_a_process_moved_to_the_background_restores_the_terminal_and_ends(tty: tuple[int, int]) -> None:
    """Its modes are still there, so nobody else will put the old ones back."""
    wrapper = f"""
        import os, signal, subprocess, sys
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)

        def foreground():
            os.tcsetpgrp(0, os.getpid())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)

        child = subprocess.Popen([sys.executable, "-c", {textwrap.dedent(_CHILD)!r}, "0.5"], process_group=0,
                                 stderr=subprocess.PIPE, preexec_fn=foreground)
        assert child.stderr.readline() == b"raw\\n"
        os.tcsetpgrp(0, os.getpgrp())
        sys.exit(child.wait(10))
    """

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    before = termios.tcgetattr(tty[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(wrapper)],
        stdin=tty[1], stdout=tty[1], preexec_fn=own_terminal, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert termios.tcgetattr(tty[1]) == before


def test_stop_and_continue(tty: tuple[int, int]) -> None:
    """SIGTSTP, the shell restores its modes, SIGCONT: raw again, and restored at the end."""
    before = termios.tcgetattr(tty[1])
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_CHILD), "3"], stdin=tty[1], stdout=tty[1],
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert child.stderr is not None
    with child.stderr:
        assert child.stderr.readline() == b"raw\n"
    child.send_signal(signal.SIGSTOP)
    termios.tcsetattr(tty[1], termios.TCSANOW, before)
    child.send_signal(signal.SIGCONT)
    assert wait_for(lambda: _is_raw(tty[1]), 3)
    assert child.wait(20) == 0
    assert termios.tcgetattr(tty[1]) == before
