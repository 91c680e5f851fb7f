"""Messages that are about the device as a whole, in a session with a real vdev."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from qvm_vhost_user.protocol import NEEDS, SHAPES, STATE, U64, ProtocolFeature, Request
from qvm_vhost_user.testing import ALL_FEATURES, Client, Refused
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_entropy import VirtioEntropy
from session_kit import ServedVdev, rejected

from qvmcore.api import VirtioVdev, Virtqueue
from qvmcore.virtio import spec

OWN = 1 << 30
VERSION_1 = 1 << spec.VIRTIO_F_VERSION_1
PACKED = 1 << spec.VIRTIO_F_RING_PACKED
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
WCE = 32

pytestmark = pytest.mark.usefixtures("nothing_left_open")


@pytest.fixture
def served() -> Iterator[ServedVdev[VirtioEntropy]]:
    with ServedVdev(VirtioEntropy) as served:
        yield served


# ---- features ----------------------------------------------------------------------------------------


def test_GET_FEATURES_has_the_protocols_bit_but_not_what_it_cannot_carry(
    served: ServedVdev[VirtioEntropy],
) -> None:
    with served.connect() as client:
        offered = client.ask_u64(Request.GET_FEATURES)
    assert offered & OWN and offered & VERSION_1 and offered & PACKED
    assert not offered & (1 << spec.VIRTIO_F_RING_RESET | 1 << spec.VIRTIO_F_IN_ORDER)
    assert not served.used, "looking at a device does not use it up"


def test_GET_PROTOCOL_FEATURES_has_the_eight_that_are_served(served: ServedVdev[VirtioEntropy]) -> None:
    with served.connect() as client:
        assert client.ask_u64(Request.GET_PROTOCOL_FEATURES) == ALL_FEATURES


def test_SET_PROTOCOL_FEATURES_that_were_not_offered(served: ServedVdev[VirtioEntropy]) -> None:
    rejected(
        served,
        lambda client: client.send(Request.SET_PROTOCOL_FEATURES, U64.pack(1 << 1 | 1)),
        "SET_PROTOCOL_FEATURES accepts 0x2, which were not offered",
    )


def test_SET_FEATURES_uses_the_device_and_GET_STATUS_shows_FEATURES_OK(
    served: ServedVdev[VirtioEntropy],
) -> None:
    with served.connect() as client:
        client.negotiate()
        assert client.ask_u64(Request.GET_STATUS) == 0
        client.tell(Request.SET_FEATURES, U64.pack(VERSION_1 | OWN))
        assert client.ask_u64(Request.GET_STATUS) == ACKNOWLEDGE | DRIVER | FEATURES_OK
        assert served.vdev.virtio.features == VERSION_1
    assert served.used


@pytest.mark.parametrize("features", [0, VERSION_1 | 1 << 63, VERSION_1 | 1 << spec.VIRTIO_F_RING_RESET])
def test_SET_FEATURES_that_cannot_be_is_answered_or_ends_the_connection(
    served: ServedVdev[VirtioEntropy], features: int
) -> None:
    with served.connect() as client:
        client.negotiate()
        with pytest.raises(Refused):
            client.tell(Request.SET_FEATURES, U64.pack(features))
        assert not client.ask_u64(Request.GET_STATUS) & FEATURES_OK
        client.tell(Request.SET_FEATURES, U64.pack(VERSION_1))
    rejected(
        served,
        lambda client: client.send(Request.SET_FEATURES, U64.pack(features)),
        "its features are refused",
    )


@pytest.mark.parametrize("request_", list(NEEDS), ids=lambda request: request.name)
def test_a_message_of_a_protocol_feature_that_is_not_in_force(
    served: ServedVdev[VirtioEntropy], request_: Request
) -> None:
    shape, feature = SHAPES[request_], NEEDS[request_]

    def talk(client: Client) -> None:
        client.negotiate(ALL_FEATURES & ~feature.mask)
        fd = os.memfd_create("carried")
        try:
            client.send(request_, bytes(shape.least), [fd] * shape.fds[0])
        finally:
            os.close(fd)

    rejected(served, talk, f"{request_.name} without the protocol feature {feature.name}")


def test_REPLY_ACK_answers_only_who_asks_and_once_it_is_in_force(served: ServedVdev[VirtioEntropy]) -> None:
    with served.connect() as client:
        client.send(Request.SET_OWNER, flags=1 | 8)
        client.send(Request.SET_PROTOCOL_FEATURES, U64.pack(ProtocolFeature.REPLY_ACK.mask))
        client.send(Request.SET_OWNER)
        assert client.ask_u64(Request.GET_FEATURES), "nothing came before"
        client.send(Request.SET_OWNER, flags=1 | 8)
        assert client.receive() == (Request.SET_OWNER, 5, U64.pack(0), [])
        client.send(Request.GET_QUEUE_NUM, flags=1 | 8)
        assert client.receive()[2] == U64.pack(1), "its own answer is enough"
        assert client.ask_u64(Request.GET_FEATURES)


def test_GET_QUEUE_NUM_and_GET_MAX_MEM_SLOTS(disk: ServedVdev[VirtioBlk]) -> None:
    with disk.connect() as client:
        client.negotiate()
        assert client.ask_u64(Request.GET_QUEUE_NUM) == len(disk.vdev.queue_sizes)
        assert client.ask_u64(Request.GET_MAX_MEM_SLOTS) == 64


# ---- status and reset --------------------------------------------------------------------------------


def test_SET_STATUS_is_the_drivers_and_0_resets(served: ServedVdev[VirtioEntropy]) -> None:
    with served.connect() as client:
        client.negotiate()
        client.tell(Request.SET_FEATURES, U64.pack(VERSION_1 | OWN))
        client.tell(Request.SET_STATUS, U64.pack(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK))
        assert client.ask_u64(Request.GET_STATUS) == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        client.tell(Request.SET_STATUS, U64.pack(0))
        assert client.ask_u64(Request.GET_STATUS) == 0
    rejected(
        served, lambda client: (client.negotiate(), client.send(Request.SET_STATUS, U64.pack(256))), "8 bits"
    )


@pytest.mark.parametrize("request_", [Request.RESET_DEVICE, Request.SET_STATUS], ids=lambda each: each.name)
def test_a_reset_forgets_features_and_what_was_written(
    disk: ServedVdev[VirtioBlk], request_: Request
) -> None:
    with disk.driver() as driver:
        driver.client.set_config(WCE, b"\0")
        assert driver.client.get_config(WCE, 1) == b"\0"
        driver.client.tell(request_, U64.pack(0) if request_ is Request.SET_STATUS else b"")
        assert driver.client.get_config(WCE, 1) == b"\1"
        assert disk.vdev.virtio.features == 0


# ---- the session -------------------------------------------------------------------------------------


def test_the_next_client_finds_the_same_session_while_nothing_was_used(
    served: ServedVdev[VirtioEntropy],
) -> None:
    for _ in range(3):
        with served.connect() as client:
            client.negotiate()
            client.backend_channel().close()
            client.set_vring(Request.SET_VRING_NUM, 0, 32)
    assert not served.used
    with served.driver() as driver:
        driver.queues[0].submit([], [8])
        assert driver.wait(0)


def test_serve_returns_when_the_core_shuts_the_socket_down(served: ServedVdev[VirtioEntropy]) -> None:
    connection = served.connect()
    connection.client.negotiate()
    connection.server.shutdown(socket.SHUT_RDWR)
    assert connection.ended() is None
    connection.client.close()


class Clumsy(VirtioVdev):
    """Raises wherever it is called."""

    vdev_type = "clumsy"
    device_id = 4
    queue_sizes = (64,)

    def config_space(self) -> bytes:
        return bytes(4)

    def config_write(self, offset: int, data: bytes) -> None:
        raise RuntimeError("clumsy config_write")

    def on_activate(self, features: int) -> None:
        raise RuntimeError("clumsy on_activate")

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        raise AssertionError("not active")


def test_what_the_vdev_raises_is_its_fault_and_not_the_connections() -> None:
    with ServedVdev(Clumsy) as served, served.connect() as client:
        client.negotiate()
        with pytest.raises(Refused):
            client.set_config(0, b"\0")
        assert [str(error) for error in served.ctx.faults] == ["clumsy config_write"]
        client.tell(Request.SET_FEATURES, U64.pack(VERSION_1))
        with pytest.raises(Refused):
            client.tell(Request.SET_STATUS, U64.pack(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK))
        assert str(served.ctx.faults[-1]) == "clumsy on_activate"
        assert client.ask_u64(Request.GET_STATUS) & spec.DEVICE_NEEDS_RESET


def test_a_configuration_change_waits_for_the_first_ring(served: ServedVdev[VirtioEntropy]) -> None:
    """A device of which no ring runs is suspended: it sends nothing ("Suspended device state")."""
    with served.driver() as driver:
        assert driver.channel is not None
        served.vdev.virtio.config_changed(always=True)
        assert driver.channel.poll(5.0) == 1
        driver.stop_queue(0)
        served.vdev.virtio.config_changed(always=True)
        driver.client.ask_u64(Request.GET_FEATURES)
        assert driver.channel.poll() == 1
        ring = driver.queues[0]
        driver.client.set_vring(Request.SET_VRING_BASE, 0, 0)
        driver.client.set_vring_fd(Request.SET_VRING_KICK, 0, driver._vrings[0].kick)
        assert driver.channel.poll(5.0) == 2
        assert ring.in_flight == 0


def test_RESET_OWNER_disables_all_rings(served: ServedVdev[VirtioEntropy]) -> None:
    with served.driver() as driver:
        driver.client.tell(Request.RESET_OWNER)
        driver.wait(0, 0.0)  # a ring that starts signals once: a device before it may not have come to that
        request = driver.queues[0].submit([], [8])
        assert not driver.wait(0, 0.1)
        driver.client.tell(Request.SET_VRING_ENABLE, STATE.pack(0, 1))
        assert driver.wait(0)
        assert driver.queues[0].reap() == [request]
