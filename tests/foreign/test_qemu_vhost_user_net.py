"""QEMU's vhost-user client with Linux's drivers for network and entropy, attached as `qvm serve` says."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator

import pytest

from tests.foreign.qemu import Linux
from tests.foreign.qemu11 import obtained
from tests.foreign.qemu_scripts import CARDS, TWO_HOSTS, copy, ping
from tests.foreign.qemu_serve import Serve

pytestmark = pytest.mark.guest

DEVICES = f"""{CARDS}
[[vdev]]
type = "virtio-entropy"
name = "dice"
source = "random.bin"
max_bytes = 64
"""
#: What the entropy device gives out, which no other source has.
RANDOM = random.Random(5).randbytes(1 << 20)


def devices(server: Serve, extra: str) -> list[str]:
    """QEMU's options for the devices, from the lines that `qvm serve` printed; ``extra`` for each."""
    options: list[str] = []
    for name in ("left", "right", "dice"):
        words = shlex.split(server.line(name, "QEMU"))
        words = words[words.index("-chardev") :]
        words[-1] += extra
        options += words
    return options


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("vhost-user-net")
    (folder / "random.bin").write_bytes(RANDOM)
    serve = Serve(folder, DEVICES, "vhost-user")
    yield serve
    serve.close()


@pytest.fixture(scope="module", params=["QEMU 7.2, split", "QEMU 11, packed"])
def linux(server: Serve, request: pytest.FixtureRequest) -> Iterator[Linux]:
    """A guest with the two cards; the second one is the next client of the same sockets.

    QEMU 7.2 ends with a segmentation fault when a vhost-user card has MSI-X and there is no KVM.
    """
    packed = request.param.endswith("packed")
    if packed:
        newer = obtained()
        guest = Linux(devices(server, ",packed=on"), qemu=newer.command, environment=newer.environment)
    else:
        guest = Linux(devices(server, ",vectors=0"))
    try:
        features = guest.run("cat /sys/bus/virtio/devices/*/features").split()
        assert [bits[34] for bits in features] == [str(int(packed))] * 3
        guest.run(TWO_HOSTS)
        yield guest
    finally:
        guest.close()


def test_two_cards_on_one_cable_reach_each_other_by_ping(linux: Linux) -> None:
    ping(linux)


def test_a_file_comes_through_tcp_unharmed(linux: Linux) -> None:
    copy(linux)


def test_cards_of_a_vm_stopped_and_continued_many_times_still_receive(linux: Linux) -> None:
    """A buffer that was lost each time would be missed by the tenth."""
    for _ in range(10):
        linux.qmp("stop")
        linux.qmp("cont")
        ping(linux)


def test_random_numbers_come_from_the_source_and_each_only_once(linux: Linux) -> None:
    said = linux.run("""
        grep -q virtio /sys/class/misc/hw_random/rng_current || exit 1
        for n in 1 2 3 4; do head -c 64 /dev/hwrng | hexdump -ve '1/1 "%02x"'; echo; done
    """)
    places = [RANDOM.find(bytes.fromhex(line)) for line in said.splitlines()]
    assert len(places) == 4 and min(places) >= 0 and places == sorted(set(places)), places


def test_the_server_had_nothing_to_complain_of(server: Serve, linux: Linux) -> None:
    assert "warning" not in server.log and "Traceback" not in server.log, server.log
