"""A front-end that keeps the control queue of a network card for itself, as QEMU does."""

from __future__ import annotations

import pytest
from qvm_vhost_user.protocol import U64, Request
from qvm_virtio_net.device import VirtioNet
from session_kit import ServedVdev

VERSION_1 = 1 << 32
CTRL_VQ, CTRL_RX, CTRL_VLAN, GUEST_ANNOUNCE, CTRL_MAC_ADDR = (1 << bit for bit in (17, 18, 19, 21, 23))


@pytest.mark.parametrize("kept", [CTRL_RX, CTRL_VLAN, GUEST_ANNOUNCE, CTRL_MAC_ADDR])
def test_features_that_need_the_control_queue_are_accepted_without_it(kept: int) -> None:
    with ServedVdev(VirtioNet, none=True) as served, served.connect() as client:
        client.send(Request.SET_FEATURES, U64.pack(VERSION_1 | kept))
        client.ask_u64(Request.GET_FEATURES)
        assert served.vdev.virtio.features == VERSION_1 | kept | CTRL_VQ


def test_nothing_is_added_for_a_front_end_that_accepts_none_of_them() -> None:
    with ServedVdev(VirtioNet, none=True) as served, served.connect() as client:
        client.send(Request.SET_FEATURES, U64.pack(VERSION_1))
        client.ask_u64(Request.GET_FEATURES)
        assert served.vdev.virtio.features == VERSION_1
