"""GET_CONFIG, SET_CONFIG and the messages of in-flight memory, in a session with a real vdev."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from qvm_vhost_user.protocol import CONFIG, U64, Request
from qvm_vhost_user.testing import Client, Refused
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_entropy import VirtioEntropy
from session_kit import ServedVdev, rejected

from qvmcore.virtio import spec

VERSION_1 = 1 << spec.VIRTIO_F_VERSION_1
F_CONFIG_WCE, WCE = 1 << 11, 32

pytestmark = pytest.mark.usefixtures("nothing_left_open")


@pytest.fixture
def served() -> Iterator[ServedVdev[VirtioEntropy]]:
    with ServedVdev(VirtioEntropy) as served:
        yield served


# ---- configuration -----------------------------------------------------------------------------------


def test_GET_CONFIG_gives_as_many_bytes_as_asked_for(disk: ServedVdev[VirtioBlk]) -> None:
    whole = disk.vdev.config_space()
    with disk.connect() as client:
        client.negotiate()
        assert client.get_config(0, 8) == (2048).to_bytes(8, "little")
        assert client.get_config(4, 20) == whole[4:24]
        # A front end may know a longer structure than the device.
        assert client.get_config(0, 256) == whole.ljust(256, b"\0")


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (64, 1), (0xFFFF_FFFF, 4)])
def test_GET_CONFIG_of_nothing_has_an_answer_without_payload(
    disk: ServedVdev[VirtioBlk], offset: int, size: int
) -> None:
    with disk.connect() as client:
        client.negotiate()
        answer = client.ask(Request.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(size))
        assert answer.payload == b""
        assert client.get_config(0, 1)


@pytest.mark.parametrize("request_", [Request.GET_CONFIG, Request.SET_CONFIG], ids=lambda each: each.name)
def test_a_configuration_access_whose_size_is_not_that_of_its_payload(
    disk: ServedVdev[VirtioBlk], request_: Request
) -> None:
    def talk(client: Client) -> None:
        client.negotiate()
        client.send(request_, CONFIG.pack(0, 5, 0) + bytes(4))

    rejected(disk, talk, f"{request_.name} says 5 bytes and has 4")


def test_SET_CONFIG_writes_what_may_be_written(disk: ServedVdev[VirtioBlk]) -> None:
    with disk.connect() as client:
        client.negotiate()
        client.tell(Request.SET_FEATURES, U64.pack(VERSION_1 | F_CONFIG_WCE))
        before = client.get_config(0, 60)
        client.set_config(WCE, b"\0")
        client.set_config(0, b"\xff" * 8)
        after = client.get_config(0, 60)
    assert after == before[:WCE] + b"\0" + before[WCE + 1 :]


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (61, 4), (0xFFFF_FFFF, 1)])
def test_SET_CONFIG_outside_the_configuration_is_refused(
    disk: ServedVdev[VirtioBlk], offset: int, size: int
) -> None:
    with disk.connect() as client:
        client.negotiate()
        with pytest.raises(Refused):
            client.set_config(offset, bytes(size))
        assert client.get_config(0, 1)


def test_SET_CONFIG_with_unknown_flags(disk: ServedVdev[VirtioBlk]) -> None:
    def talk(client: Client) -> None:
        client.negotiate()
        client.set_config(WCE, b"\0", flags=2)

    rejected(disk, talk, "SET_CONFIG has flags 0x2, expected 0 or 1")


# ---- in flight ---------------------------------------------------------------------------------------


def test_GET_INFLIGHT_FD_gives_memory_that_SET_INFLIGHT_FD_takes(disk: ServedVdev[VirtioBlk]) -> None:
    with disk.connect() as client:
        client.negotiate()
        buffer = client.get_inflight(1, 128)
        assert (buffer.queues, buffer.queue_size, buffer.offset) == (1, 128, 0)
        assert os.fstat(buffer.fd).st_size >= buffer.size
        client.set_inflight(buffer)
        # As compilers lay it out, with padding at the end, and as they do not.
        for size in (20, 24):
            answer = client.ask(Request.GET_INFLIGHT_FD, buffer.pack().ljust(size, b"\0"))
            assert len(answer.payload) == size
            os.close(answer.fds[0])
        os.close(buffer.fd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queues": 0}, "in-flight memory for 0 queues of 128"),
        ({"queues": 9}, "in-flight memory for 9 queues of 128"),
        ({"queue_size": 0}, "in-flight memory for 1 queues of 0"),
        ({"queue_size": 2048}, "in-flight memory for 1 queues of 2048"),
        ({"size": 100}, "SET_INFLIGHT_FD has 100 bytes"),
        ({"offset": 4096 * 4096}, "is not inside a file"),
        ({"offset": 2**64 - 1}, "is not inside a file"),
    ],
)
def test_SET_INFLIGHT_FD_that_lies(disk: ServedVdev[VirtioBlk], change: dict[str, int], message: str) -> None:
    def talk(client: Client) -> None:
        client.negotiate()
        buffer = client.get_inflight(1, 128)
        try:
            client.set_inflight(buffer._replace(**change))
        finally:
            os.close(buffer.fd)

    rejected(disk, talk, message)
