"""Linux's virtio_net in User Mode Linux on cards of ours: on a cable to another UML, and on a tap."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign import uml as linux
from tests.foreign.conftest import Serving
from tests.foreign.without import Without

RING_PACKED = 34
SIZE = 8 << 20


def vdev(name: str, **options: object) -> str:
    """The ``[[vdev]]`` table of a card."""
    more = "".join(f"{key} = {value!r}\n" for key, value in options.items())
    return f'[[vdev]]\ntype = "virtio-net"\nname = "{name}"\n{more}'


def up(number: int) -> str:
    """The guest's interface gets an address; prints what the driver accepted."""
    return f"""
    echo features $(cat /sys/class/net/eth0/device/features)
    ip link set lo up; ip addr add 192.0.2.{number}/24 dev eth0; ip link set eth0 up
    echo address $(cat /sys/class/net/eth0/address)
    """


def checksums(text: str) -> list[str]:
    """Those a script has printed."""
    return re.findall(r"^sum (\w+)$", text, re.MULTILINE)


@pytest.fixture(params=["packed", "split"])
def rings(request: pytest.FixtureRequest, short: Path) -> Callable[[Path], Path]:
    """``rings(socket)``: where to attach for rings of this kind."""

    def attach(socket: Path) -> Path:
        if request.param == "packed":
            return socket
        without = Without(short / f"split-{socket.name}", socket, RING_PACKED)
        request.addfinalizer(without.close)
        return without.path

    return attach


def accepted(text: str, bit: int) -> bool:
    """Whether the driver has accepted a feature."""
    return text.split("features ")[1].split()[0][bit] == "1"


def test_two_guests_on_a_cable_ping_and_copy_over_tcp(
    request: pytest.FixtureRequest,
    serve: Callable[..., Serving],
    uml: Callable[..., linux.Uml],
    rings: Callable[[Path], Path],
    short: Path,
) -> None:
    cable = str(short / "cable")
    serving = serve(
        vdev("one", peer=cable, mac="02:00:00:00:00:01") + vdev("two", peer=cable, mac="02:00:00:00:00:02"),
        "one",
        "two",
    )
    one = uml(
        f"{up(1)}\ninside receive 5001; inside send 192.0.2.2 5002 {SIZE}",
        [(rings(serving.socket("one")), linux.NET)],
        modules="virtio_net",
    )
    two = uml(
        f"{up(2)}\ninside ping 192.0.2.1 64 1400 9000\n"
        f"inside send 192.0.2.1 5001 {SIZE}; inside receive 5002",
        [(rings(serving.socket("two")), linux.NET)],
        modules="virtio_net",
    )
    texts = [one.wait(), two.wait()]
    for text, mac in zip(texts, ("02:00:00:00:00:01", "02:00:00:00:00:02"), strict=True):
        assert f"\naddress {mac}\n" in text
        assert accepted(text, RING_PACKED) == ("[packed]" in request.node.name)
    assert len(checksums(texts[0])) == 2
    assert checksums(texts[0]) == checksums(texts[1])
    serving.stop()


def test_a_guest_that_was_killed_is_replaced_on_its_cable(
    serve: Callable[..., Serving], uml: Callable[..., linux.Uml], short: Path
) -> None:
    cable = str(short / "cable")
    serving = serve(vdev("one", peer=cable) + vdev("two", peer=cable), "one", "two")
    stays = uml(f"{up(1)}\nread go", [(serving.socket("one"), linux.NET)], modules="virtio_net")
    for fate in ("killed", "ended"):
        other = uml(
            f"{up(2)}\ninside ping 192.0.2.1 64 1400\necho pinged\nread go",
            [(serving.socket("two"), linux.NET)],
            modules="virtio_net",
        )
        other.expect("^pinged$")
        if fate == "killed":
            other.kill()
    for guest in (stays, other):
        guest.type("go")
        guest.wait()
    serving.stop()


def test_a_guest_on_a_tap_copies_to_the_host(
    serve: Callable[..., Serving], uml: Callable[..., linux.Uml]
) -> None:
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("no `ip` or `nsenter`: apt-get install iproute2 util-linux")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        subprocess.run(["unshare", "-n", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tap interfaces in a network namespace of our own: {error}")
    serving = serve(vdev("net0", tap="tq0"), "net0", prefix=("unshare", "-n"))
    enter = ["nsenter", f"--net=/proc/{serving.process.pid}/ns/net"]
    for words in ("addr add 192.0.2.1/24 dev tq0", "link set tq0 up"):
        subprocess.run([*enter, "ip", *words.split()], check=True)
    guest = uml(
        f"{up(2)}\ninside ping 192.0.2.1 64 1400 9000\ninside send 192.0.2.1 5001 {SIZE}",
        [(serving.socket("net0"), linux.NET)],
        modules="virtio_net",
    )
    host = subprocess.run(
        [*enter, sys.executable, str(linux.INSIDE), "receive", "5001"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert checksums(guest.wait()) == checksums(host) != []
    serving.stop()
