"""A crowd of bad clients, one after the other, each heard to its end: nothing of them is left."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest
from hostile import BROKEN, FILE_SIZE, NO_VERSION, WRONG, opened
from qvm_vfio_user.testing import MSIX, Client, Gone, Irq
from vfio_serving import DEVICES, Serving

pytest.importorskip("qvm_hello", reason="the example vdev is not installed")
pytest.importorskip("qvm_virtio_entropy", reason="virtio-entropy is not installed")

#: How many bad connections the crowd is.
CROWD = int(os.environ.get("QVM_BAD_CONNECTIONS", "10000"))
TARGET = "rng0"
#: Bytes and kinds of descriptors: what no conversation begins with, and what must not come later.
FIRST = [(bad.bytes(), bad.fds) for bad in NO_VERSION.values()]
LATER = [(bad.bytes(), bad.fds) for bad in WRONG.values()] + [(data, ()) for data in BROKEN.values()]


def misbehave(client: Client, rng: random.Random) -> None:
    """Up to three bad messages, the last one perhaps cut short; ends when the server has hung up.

    Before that most give the server a file to map and an eventfd, which it has to let go of.
    """
    begun = rng.randrange(4) > 0
    if begun:
        client.version()
        with opened(("memfd", "eventfd")) as (memory, event):
            client.dma_map(0x100_0000, FILE_SIZE, memory)
            client.set_irqs(Irq.EVENTFD | Irq.TRIGGER, MSIX, fds=[event])
    try:
        for last in (False,) * rng.randrange(3) + (True,):
            data, kinds = rng.choice(LATER if begun else FIRST)
            if last and rng.randrange(3) == 0:
                data = data[: rng.randrange(1, len(data))]
            with opened(kinds) as fds:
                client.send(data, fds)
        # The next one would be turned away while this one is there.
        client.socket.shutdown(socket.SHUT_WR)
        while True:
            client.receive()
    except (Gone, BrokenPipeError):
        pass


def test_a_crowd_of_bad_clients_leaves_nothing(tmp_path: Path) -> None:
    """QVM_BAD_CONNECTIONS makes it a smaller crowd."""
    rng = random.Random(1)
    with Serving(tmp_path, DEVICES) as serving:
        for number in range(CROWD):
            with serving.client(TARGET) as client:
                misbehave(client, rng)
            if number % 500 == 0:
                serving.settle()
                serving.check_alive()
        serving.settle()
        assert "turned away" not in serving.log
        serving.check_entropy()
        assert serving.stop() == 0
