"""Two real guests on one cable: Linux's own driver, ping, a file by TCP, a cable that comes and goes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SIZE = 8 << 20

#: The serving guest: the file is its disk. It says so before its address answers.
SERVER = """
nc -ll -p 9000 -e cat /dev/vda &
ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up
echo "server: up"
read line
ip -s link show eth0 2>/dev/null
grep . /sys/class/net/eth0/statistics/rx_packets
"""

CLIENT = """
ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; mkfifo /tmp/quiet
until ping -c 1 -W 1 10.0.0.1 >/dev/null 2>&1; do sleep 0.2; done
echo "client: carrier $(cat /sys/class/net/eth0/carrier) mtu $(cat /sys/class/net/eth0/mtu)"
ping -c 3 10.0.0.1
nc 10.0.0.1 9000 <>/tmp/quiet | md5sum
echo "client: fetched"
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
echo "client: cable out"
"""

_CARD = """
[[vdev]]
type = "virtio-net"
name = "net0"
loc = 0x1c0f0000
intr = "gic:43"
peer = "./lan0"
"""


@pytest.fixture
def second(files: Path) -> Iterator[Callable[..., Any]]:
    """``second(script, vdevs)``: another VM beside that of ``start``, with a name of its own."""
    from tests.guest.conftest import Vm

    running = []

    def begin(script: str, vdevs: str) -> Any:
        machine = files / "second.toml"
        machine.write_text(f'include = ["vm.toml"]\n{vdevs}')
        line = "console=hvc0 quiet qvm.exec=" + base64.b64encode(script.encode()).decode()
        command = [sys.executable, "-m", "qvmcore", "run", str(machine)]
        vm = Vm(
            subprocess.Popen(
                [*command, "--set", "system.name=second", "--set", f"load.cmdline={line}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=files,
                env=dict(os.environ),
            )
        )  # fmt: skip
        running.append(vm)
        return vm

    yield begin
    for vm in running:
        if vm.process.poll() is None:
            vm.process.kill()
        vm.process.wait()
        for pipe in (vm.process.stdin, vm.process.stdout):
            if pipe is not None:
                pipe.close()


def test_two_guests_ping_and_copy_a_file(
    start: Callable[..., Any], second: Callable[..., Any], files: Path
) -> None:
    data = random.Random(3).randbytes(SIZE)
    (files / "disk.img").write_bytes(data)
    disk = '[[vdev]]\ntype = "virtio-blk"\nloc = 0x1c0d0000\nintr = "gic:41"\nhostdev = "<disk.img"\n'
    # The client first: either may start before the other.
    client = start(CLIENT, vdevs=_CARD + 'pcap = "net.pcap"\n')
    server = second(SERVER, _CARD + disk)
    server.expect("server: up")
    client.expect("client: fetched")
    assert "client: carrier 1 mtu 1500" in client.text
    assert "3 packets transmitted, 3 packets received, 0% packet loss" in client.text
    assert hashlib.md5(data).hexdigest() in client.text
    # What Linux sends is passed on as it is: large, its checksums unfinished.
    report = subprocess.run(
        [sys.executable, "-m", "qvmcore", "status", str(client.process.pid), "--json"],
        capture_output=True, check=True,
    )  # fmt: skip
    (card,) = (vdev["status"] for vdev in json.loads(report.stdout)["vdevs"] if vdev["name"] == "net0")
    assert card["rx_finished"] == 0
    assert card["rx_bytes"] > SIZE
    assert card["rx_bytes"] / card["rx_frames"] > 3 * 1500
    server.type("\n")
    assert server.wait() == 0
    client.expect("client: cable out")
    assert client.wait() == 0
    capture = (files / "net.pcap").read_bytes()
    assert len(capture) > SIZE and data[:1000] in capture
