"""virtio-net over vhost-user with DPDK's polling driver: no interrupts, no kernel, other rings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.foreign.testpmd import PROGRAM, forward

pytestmark = pytest.mark.skipif(
    shutil.which(PROGRAM) is None, reason=f"no {PROGRAM}: apt-get install dpdk-dev"
)

CARDS = """
[[vdev]]
type = "virtio-net"
name = "left"
peer = "{cable}"
[[vdev]]
type = "virtio-net"
name = "right"
peer = "{cable}"
"""


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("", 64),
        (",packed_vq=1", 64),
        (",mrg_rxbuf=0", 1500),
        (",packed_vq=1,mrg_rxbuf=0", 1500),
        (",in_order=0", 64),
        (",packed_vq=1,in_order=0,mrg_rxbuf=1", 1500),
    ],
)
def test_frames_go_round_between_two_cards(
    serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, options: str, size: int
) -> None:
    cable = tmp_path_factory.mktemp("cable").name
    serving = serve(CARDS.format(cable=cable), "left", "right")
    ports, said = forward([serving.socket("left"), serving.socket("right")], options, size, 2.0)
    for port in ports:
        assert port.errors == 0, said
        # Two bursts of 32 frames circulate: each has to come round again and again.
        assert port.received > 640, said
    serving.expect("right: client disconnected")
    serving.stop()
    assert "in hand" not in serving.text


def test_a_driver_that_comes_again_finds_new_cards(
    serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    serving = serve(CARDS.format(cable=tmp_path_factory.mktemp("cable").name), "left", "right")
    for options in ("", ",packed_vq=1", ""):
        ports, said = forward([serving.socket("left"), serving.socket("right")], options, 64, 1.0)
        assert all(port.received > 320 for port in ports), said
    serving.stop()
