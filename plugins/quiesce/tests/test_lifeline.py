"""The death of a process is heard at its beginning; that it let go in order is not taken for one."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from qvm_quiesce.lifeline import Lifeline, LifelineError, Listener

OWNER = """
import os, sys, threading
from qvm_quiesce.lifeline import Lifeline

line = Lifeline()
sys.stdout.write(f"{line.fd}\\n")
sys.stdout.flush()
exec(sys.stdin.readline())
"""


def listen(fd: int) -> bool:
    """What the other side hears, within a bound."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(Listener(fd).wait).result(20)


@pytest.mark.parametrize(
    ("end", "dead"),
    [
        ("os.kill(os.getpid(), 9)", True),
        ("os.abort()", True),
        ("os._exit(0)", True),
        ("os.execv('/bin/sleep', ['sleep', '60'])", True),
        ("line.release(); import time; time.sleep(60)", False),
    ],
)
def test_a_process_that_ends_is_heard(end: str, dead: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        number = int(process.stdout.readline())
        fd = os.open(f"/proc/{process.pid}/fd/{number}", os.O_RDWR)
        process.stdin.write(end.encode() + b"\n")
        process.stdin.flush()
        assert listen(fd) == dead
        process.send_signal(signal.SIGKILL)


def test_letting_go_leaves_nothing() -> None:
    before = (set(os.listdir("/proc/self/fd")), threading.active_count())
    line = Lifeline()
    assert threading.active_count() == before[1] + 1
    line.release()
    line.release()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.parametrize("what", ["thread", "memory"])
def test_a_host_without_the_means_says_why(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread") if what == "thread" else OSError(12, "no memory")

    owner: Any = threading.Thread if what == "thread" else mmap
    monkeypatch.setattr(owner, "start" if what == "thread" else "mmap", refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises((LifelineError, OSError), match=r"thread|memory"):
        Lifeline()
    assert set(os.listdir("/proc/self/fd")) == before
