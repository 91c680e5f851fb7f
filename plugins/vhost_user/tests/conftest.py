"""A server under attack; and vdevs whose sessions are in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_kit import Target
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_entropy import VirtioEntropy
from session_kit import ServedVdev, descriptors, make_disk


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One server for all attacks: what one leaves behind another meets."""
    target = Target(tmp_path_factory.mktemp("attack"))
    yield target
    target.close()


@pytest.fixture
def target(served: Target) -> Iterator[Target]:
    """The server, which has to be as before when the test has ended."""
    served.revive()
    mark = len(served.serve.log)
    yield served
    served.survived(mark)


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Descriptors to be closed after the test."""
    collected: list[int] = []
    yield collected
    for fd in collected:
        os.close(fd)


@pytest.fixture
def nothing_left_open(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """For modules that ask for it: a test closes all that it opened."""
    before = descriptors()
    yield
    # The errors in the log hold the memory they were about.
    caplog.get_records("call").clear()
    assert not descriptors() - before


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    """Both kinds of ring."""
    return bool(request.param)


@pytest.fixture
def rng() -> Iterator[ServedVdev[VirtioEntropy]]:
    """A vdev with one queue, in a session."""
    with ServedVdev(VirtioEntropy) as served:
        yield served


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ServedVdev[VirtioBlk]]:
    """A disk of which each sector says which one it is, in a session."""
    with make_disk(tmp_path) as served:
        yield served
