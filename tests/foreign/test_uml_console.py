"""Linux's virtio_console in User Mode Linux, and several devices of one process in one guest."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign import uml as linux
from tests.foreign.conftest import Serving

LIMIT = 60


def vdev(kind: str, name: str, **options: object) -> str:
    """A ``[[vdev]]`` table."""
    more = "".join(f"{key} = {value}\n" for key, value in options.items())
    return f'[[vdev]]\ntype = "{kind}"\nname = "{name}"\n{more}'


def connect(path: Path) -> socket.socket:
    """A client of a console's Unix socket, which is there as long as the console lives."""
    deadline = time.monotonic() + LIMIT
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT)
    client.connect(str(path))
    return client


def read_until(client: socket.socket, end: bytes) -> bytes:
    """All up to and including ``end``."""
    data = b""
    while not data.endswith(end):
        chunk = client.recv(65536)
        assert chunk, f"closed after {data!r}"
        data += chunk
    return data


def test_hvc0_is_read_and_written_over_a_unix_socket(
    serve: Callable[..., Serving], uml: Callable[..., linux.Uml], short: Path
) -> None:
    """The host speaks first, so nothing depends on when it connects."""
    serving = serve(vdev("virtio-console", "con0", hostdev=f'"unix:{short}/c"'), "con0")
    client = connect(short / "c")
    guest = uml(
        "exec 3<>/dev/hvc0; stty -echo raw <&3; echo ready\n"
        "read line <&3; echo got $line; echo answer to $line >&3; seq 5000 >&3; read bye <&3",
        [(serving.socket("con0"), linux.CONSOLE)],
        modules="virtio_console",
    )
    guest.expect("^ready$")
    client.sendall(b"question\n")
    assert read_until(client, b"\n5000\n") == b"answer to question\n" + b"".join(
        b"%d\n" % number for number in range(1, 5001)
    )
    client.sendall(b"bye\n")
    assert "\ngot question\n" in guest.wait()
    client.close()
    serving.stop()


def test_a_port_carries_bytes_both_ways_unchanged(
    serve: Callable[..., Serving], uml: Callable[..., linux.Uml], short: Path
) -> None:
    data = random.Random(2).randbytes(1 << 20)
    ports = f'[{{name = "data", hostdev = "unix:{short}/p"}}]'
    serving = serve(vdev("virtio-console", "con0", hostdev='"null"', ports=ports), "con0")
    client = connect(short / "p")
    guest = uml(
        # The driver makes a port when the device has told it of one: after modprobe, perhaps.
        f"name=/sys/class/virtio-ports/vport0p1/name; until cat $name 2>/dev/null; do sleep 0.1; done\n"
        f"exec 3<>/dev/vport0p1\n"
        f"head -c {len(data)} <&3 >/run/data; cat /run/data >&3; read bye <&3",
        [(serving.socket("con0"), linux.CONSOLE)],
        modules="virtio_console",
    )
    guest.expect("^data$")
    client.sendall(data)
    back = b""
    while len(back) < len(data):
        chunk = client.recv(1 << 20)
        assert chunk
        back += chunk
    assert back == data
    client.sendall(b"bye\n")
    guest.wait()
    client.close()
    serving.stop()


def test_console_output_goes_to_a_file(
    serve: Callable[..., Serving], uml: Callable[..., linux.Uml], tmp_path: Path
) -> None:
    """``>`` would empty the file for the next client as soon as this one has left."""
    output = tmp_path / "out.txt"
    serving = serve(vdev("virtio-console", "con0", hostdev=f'">>{output}"'), "con0")
    guest = uml(
        "stty raw </dev/hvc0; seq 6000 >/dev/hvc0; stty raw </dev/hvc0",
        [(serving.socket("con0"), linux.CONSOLE)],
        modules="virtio_console",
    )
    guest.wait()
    serving.stop()
    assert output.read_text() == "".join(f"{number}\n" for number in range(1, 6001))


#: UML's kernel has no driver for entropy devices; the device is there and does no harm.
ALL = """
for each in /sys/bus/virtio/devices/*; do echo device $(cat $each/device) $(cat $each/status); done
md5sum </dev/vda | sed 's/^/vda /'; md5sum </dev/vdb | sed 's/^/vdb /'
ip link set eth0 up; cat /sys/class/net/eth0/address
exec 3<>/dev/hvc0; stty -echo raw <&3; echo hello from hvc0 >&3
echo hello from vdb | dd of=/dev/vdb conv=fsync
read bye <&3
"""


@pytest.mark.parametrize("guests", [2])
def test_one_process_serves_a_whole_guest_twice(
    serve: Callable[..., Serving], uml: Callable[..., linux.Uml], short: Path, tmp_path: Path, guests: int
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(4 << 20))
    serving = serve(
        vdev("virtio-blk", "diska", hostdev=f'"{tmp_path}/a"')
        + vdev("virtio-blk", "diskb", hostdev=f'"{tmp_path}/b"')
        + vdev("virtio-net", "net0", none="true", mac='"02:00:00:00:00:07"')
        + vdev("virtio-console", "con0", hostdev=f'"unix:{short}/c"')
        + vdev("virtio-entropy", "rng0"),
        *("diska", "diskb", "net0", "con0", "rng0"),
    )
    for _ in range(guests):
        kinds = {"diska": linux.BLK, "diskb": linux.BLK, "net0": linux.NET, "con0": linux.CONSOLE, "rng0": 4}
        guest = uml(
            ALL,
            [(serving.socket(name), number) for name, number in kinds.items()],
            modules="virtio_blk virtio_net virtio_console",
        )
        client = connect(short / "c")
        assert read_until(client, b"\n") == b"hello from hvc0\n"
        client.sendall(b"bye\n")
        text = guest.wait()
        assert sorted(line.split()[1] for line in text.splitlines() if line.startswith("device ")) == [
            "0x0001", "0x0002", "0x0002", "0x0003", "0x0004",
        ]  # fmt: skip
        assert "\n02:00:00:00:00:07\n" in text
        client.close()
    serving.stop()
    assert (tmp_path / "b").read_bytes().startswith(b"hello from vdb\n")
