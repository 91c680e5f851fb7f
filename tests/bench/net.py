#!/usr/bin/env python3
"""TCP between two guests: qvm over ``peer`` against qemu-system-aarch64 (TCG) over a stream netdev.

Same kernel, initramfs and guest scripts; one guest serves a file from its memory over TCP, the other
fetches it. Time runs from the connection to the last byte. Both pairs alternate in one run.

    python tests/bench/net.py [--runs 3] [--megabytes 32] [--json]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = 0.8
LIMIT = 120.0

#: The server listens before its address answers, so a client that gets an answer can connect.
#: Both ends move 64 KiB at a time: what is measured is the network, not the guest's system calls.
SERVER = """
dd if=/dev/zero of=/tmp/file bs=1M count=@MEGABYTES@ 2>/dev/null
nc -ll -p 9000 -e dd if=/tmp/file bs=64k &
ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up
sleep 100000
"""
CLIENT = """
ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up
until ping -c 1 -W 1 10.0.0.1 >/dev/null 2>&1; do sleep 0.2; done
sleep 1
echo bench-begin
nc 10.0.0.1 9000 -e dd of=/tmp/file bs=64k
echo bench-end
echo "bench-bytes: $(stat -c %s /tmp/file) end"
"""


def qvm_command(folder: Path, guest: Path, who: str, cmdline: str) -> list[str]:
    """One end of the pair; both name the same link."""
    path = folder / f"{who}.toml"
    path.write_text(
        f"""
[system]
name = "{who}"
board = "arm64-virt"
ram = "256M"
[load]
kernel = "{guest}/vmlinuz"
initrd = "{guest}/initramfs.cpio.gz"
cmdline = "{cmdline}"
[[vdev]]
type = "pl011"
name = "uart0"
hostdev = "stdio"
[[vdev]]
type = "virtio-net"
name = "net0"
loc = 0x1c0d0000
intr = "gic:41"
peer = "./lan.qvm"
"""
    )
    return [sys.executable, "-m", "qvmcore", "-q", "run", str(path)]


def qemu_command(folder: Path, guest: Path, who: str, cmdline: str) -> list[str]:
    """The same with QEMU; the server listens."""
    link = (
        f"stream,id=n,server={'on' if who == 'server' else 'off'},addr.type=unix,addr.path={folder}/lan.qemu"
    )
    return [
        "qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-m", "256", "-nographic", "-no-reboot",
        "-kernel", f"{guest}/vmlinuz", "-initrd", f"{guest}/initramfs.cpio.gz", "-append", cmdline,
        "-global", "virtio-mmio.force-legacy=false", "-netdev", link,
        "-device", f"virtio-net-device,netdev=n,mac=02:00:00:00:00:0{1 if who == 'server' else 2}",
    ]  # fmt: skip


def wait_for(process: subprocess.Popen[bytes], mark: bytes, text: bytearray) -> float:
    """When the mark came on the console."""
    assert process.stdout is not None
    deadline = time.monotonic() + LIMIT
    while mark not in text:
        chunk = os.read(process.stdout.fileno(), 4096)
        text += chunk
        if not chunk or time.monotonic() > deadline:
            sys.exit(f"no {mark!r} from the guest:\n{text.decode(errors='replace')[-2000:]}")
    return time.monotonic()


def transfer(commands: list[list[str]], folder: Path, megabytes: int) -> float:
    """Megabytes a second from the first guest to the second."""
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": folder}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(commands[0], stdout=log, **pipes)  # type: ignore[call-overload]
        try:
            time.sleep(1.0)  # QEMU's client needs a server that listens
            client = subprocess.Popen(commands[1], stdout=subprocess.PIPE, **pipes)  # type: ignore[call-overload]
            try:
                text = bytearray()
                begin = wait_for(client, b"bench-begin", text)
                end = wait_for(client, b"bench-end", text)
                wait_for(client, b" end\r\n", text)
                if f"bench-bytes: {megabytes << 20} end".encode() not in text:
                    sys.exit(f"the file did not arrive whole:\n{text.decode(errors='replace')[-2000:]}")
            finally:
                client.kill()
                client.wait()
                client.stdout.close()
        finally:
            server.kill()
            server.wait()
    return megabytes * (1 << 20) / 1e6 / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--guest", type=Path, default=ROOT / ".demo" / "debian-arm64")
    arguments = parser.parse_args()
    if shutil.which("qemu-system-aarch64") is None:
        sys.exit("qemu-system-aarch64 is not installed: apt-get install qemu-system-arm")
    rates: dict[str, list[float]] = {"qvm": [], "qemu": []}
    for _ in range(arguments.runs):
        for who, make in (("qvm", qvm_command), ("qemu", qemu_command)):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                commands = []
                for end, script in (("server", SERVER), ("client", CLIENT)):
                    words = script.replace("@MEGABYTES@", str(arguments.megabytes)).encode()
                    cmdline = "console=ttyAMA0 quiet qvm.exec=" + base64.b64encode(words).decode()
                    commands.append(make(folder, arguments.guest, end, cmdline))
                rates[who].append(transfer(commands, folder, arguments.megabytes))
    medians = {who: statistics.median(values) for who, values in rates.items()}
    ratio = medians["qvm"] / medians["qemu"]
    if arguments.json:
        rows = {who: [round(value, 1) for value in values] for who, values in rates.items()}
        print(json.dumps({"mb_per_s": rows, "ratio": round(ratio, 2)}))
        return
    for who, values in rates.items():
        shown = ", ".join(f"{value:.1f}" for value in values)
        print(f"{who:5} TCP guest to guest: median {medians[who]:6.1f} MB/s  ({shown})")
    print(f"ratio qvm / qemu: {ratio:.2f}  (target >= {TARGET})")


if __name__ == "__main__":
    main()
