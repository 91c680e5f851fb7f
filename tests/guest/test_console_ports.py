"""A virtio console with several ports in a real Linux guest."""

from __future__ import annotations

import hashlib
import os
import pty
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PORTS = """
ports = [
  {name = "log", hostdev = ">log.txt"},
  {name = "chat", hostdev = "unix:chat"},
  {name = "pipe", hostdev = ">|dd status=none of=piped"},
  {name = "tty2", hostdev = ">tty2.txt", console = true},
]
"""

#: Finds a port by its name, as udev does for /dev/virtio-ports.
FIND = """
port() { for d in /sys/class/virtio-ports/*; do
  [ "$(cat $d/name)" = $1 ] && echo /dev/${d##*/}; done; }
"""


def _with_ports(files: Path, pci: bool = False) -> None:
    machine = files / "vm.toml"
    text = machine.read_text().rstrip() + PORTS
    if pci:
        text = "".join(line for line in text.splitlines(True) if not line.startswith(("loc", "intr")))
    machine.write_text(text)


def _client(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(120)
    client.connect(str(path))
    return client


@pytest.mark.parametrize("pci", [False, True], ids=["mmio", "pci"])
def test_ports_by_name_in_both_directions_beside_the_console(
    start: Callable[..., Any], files: Path, pci: bool
) -> None:
    _with_ports(files, pci)
    data = os.urandom(300_000)
    vm = start(
        FIND
        + """
echo to the log >$(port log)
echo to the command >$(port pipe)
echo to the second console >/dev/hvc1
exec 3<>$(port chat)
echo ready
echo hello >&3
read -r line <&3
echo heard $line
sum=$(head -c 300000 <&3 | sha256sum)
echo $sum >&3
seq 100000 >&3
exec 3>&-
""",
    )
    vm.expect("ready\n")
    client = _client(files / "chat")
    stream = client.makefile("rwb")
    assert stream.readline() == b"hello\n", "the guest's write waited for us"
    stream.write(b"and back\n" + data)
    stream.flush()
    assert stream.readline().split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert stream.read(588_895) == b"".join(b"%d\n" % n for n in range(1, 100_001))
    assert vm.wait() == 0
    assert "heard and back" in vm.text
    assert (files / "log.txt").read_bytes() == b"to the log\n"
    assert (files / "piped").read_bytes() == b"to the command\n"
    assert (files / "tty2.txt").read_bytes() == b"to the second console\r\n"
    client.close()


def test_a_port_nobody_reads_holds_back_neither_the_console_nor_the_others(
    start: Callable[..., Any], files: Path
) -> None:
    _with_ports(files)
    vm = start(
        FIND
        + """
echo ready
(seq 200000 >$(port chat)) &
echo go >$(port pipe)
i=0; while [ $i -lt 60 ]; do echo line $i; echo line $i >$(port log); i=$((i + 1)); sleep 0.1; done
wait
""",
    )
    vm.expect("ready")
    client = _client(files / "chat")
    # Longer than a console would wait for a receiver: a port loses nothing.
    vm.expect("line 59\n", 60)
    before = (files / "log.txt").read_text()
    expected = b"".join(b"%d\n" % n for n in range(1, 200_001))
    assert client.makefile("rb").read(len(expected)) == expected
    assert vm.wait() == 0
    assert before.startswith("line 0\n") and "line 50\n" in before
    assert (files / "log.txt").read_text() == "".join(f"line {n}\n" for n in range(60))
    client.close()


def test_the_size_of_the_terminal_and_its_change_reach_the_guest(files: Path) -> None:
    _with_ports(files)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (37, 91))
    process = subprocess.Popen(
        [sys.executable, "-m", "qvmcore", "run", "vm.toml", "--set", "load.cmdline=console=hvc0 quiet"],
        cwd=files, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.set_blocking(master, False)
    output = b""

    def expect(text: bytes) -> None:
        nonlocal output
        deadline = time.monotonic() + 240
        while text not in output:
            assert time.monotonic() < deadline and process.poll() is None, output.decode()
            try:
                output += os.read(master, 4096)
            except BlockingIOError:
                time.sleep(0.02)

    try:
        expect(b"End it with")
        os.write(master, b"stty size\n")
        expect(b"37 91")
        termios.tcsetwinsize(slave, (50, 132))
        os.write(master, b"until stty size | grep 132; do sleep 0.1; done\n")
        expect(b"50 132")
        os.write(master, b"poweroff\n")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                os.read(master, 4096)
            except BlockingIOError:
                time.sleep(0.02)
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)
        os.close(slave)
