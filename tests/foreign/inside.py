"""What a script in User Mode Linux calls: tools a small machine may lack. Standard library only."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import socket
import struct
import sys
import time
from pathlib import Path

_POWER_OFF, _RESTART = 0x4321FEDC, 0x01234567
_SYS_FINIT_MODULE = 313
#: What has to be loaded before a module.
_BEFORE = {"virtio_net": ("failover", "net_failover")}
_libc = ctypes.CDLL(None, use_errno=True)


def poweroff() -> None:
    """End the machine at once."""
    os.sync()
    _libc.reboot(_POWER_OFF)


def restart() -> None:
    """Reset the machine at once."""
    os.sync()
    _libc.reboot(_RESTART)


def insmod(*names: str) -> None:
    """Load modules of the running kernel."""
    folder = Path("/usr/lib/uml/modules", platform.release())
    for name in [each for last in names for each in (*_BEFORE.get(last, ()), last)]:
        with next(folder.rglob(f"{name}.ko")).open("rb") as module:
            if _libc.syscall(_SYS_FINIT_MODULE, module.fileno(), b"", 0):
                raise OSError(ctypes.get_errno(), f"insmod {name}")


def checksum(data: bytes) -> int:
    """The internet checksum of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(address: str, *sizes: str) -> None:
    """One echo of each size; lost ones are sent again, for the address may not be known yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.settimeout(1)
        for number, size in enumerate(sizes):
            data = os.urandom(int(size))
            head = struct.pack(">HH", os.getpid() & 0xFFFF, number)
            check = checksum(b"\x08\0\0\0" + head + data)
            for _ in range(30):
                raw.sendto(struct.pack(">BBH", 8, 0, check) + head + data, (address, 0))
                try:
                    # The IP header has no options; on a loopback the request is heard too.
                    while (answer := raw.recv(65536)[20:])[:1] != b"\0" or answer[4:8] != head:
                        pass
                except TimeoutError:
                    continue
                if answer[8:] != data:
                    sys.exit(f"ping: {size} bytes came back changed")
                break
            else:
                sys.exit(f"ping: no answer to {size} bytes from {address}")
            print(f"ping {size} ok", flush=True)


def send(address: str, port: str, size: str) -> None:
    """Random bytes to whoever listens there; prints their checksum."""
    data = os.urandom(int(size))
    deadline = time.monotonic() + 60
    while True:
        try:
            connection = socket.create_connection((address, int(port)), 5)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    with connection:
        connection.settimeout(60)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        # The other end closes when it has everything.
        connection.recv(1)
    print("sum", hashlib.md5(data).hexdigest(), flush=True)


def receive(port: str) -> None:
    """What one client sends; prints its checksum."""
    with socket.create_server(("", int(port))) as listener:
        listener.settimeout(90)
        connection, _ = listener.accept()
        with connection:
            digest = hashlib.md5()
            while chunk := connection.recv(1 << 20):
                digest.update(chunk)
    print("sum", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    COMMANDS = (poweroff, restart, insmod, ping, send, receive)
    {each.__name__: each for each in COMMANDS}[sys.argv[1]](*sys.argv[2:])
