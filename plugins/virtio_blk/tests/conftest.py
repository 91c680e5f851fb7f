"""An image with known contents, and guests with a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import Guest, Start

from qvmcore.testing.driver import MmioDriver
from qvmcore.testing.fakes import Plugged, plug


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 128 sectors; sector n is filled with byte n."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([n]) * 512 for n in range(128)))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[Callable[..., Plugged[VirtioBlk]]]:
    """``disk(**options)``: a plugged device; hostdev is ``image`` unless given."""
    with ExitStack() as stack:

        def make(**options: object) -> Plugged[VirtioBlk]:
            options.setdefault("hostdev", str(image))
            return stack.enter_context(plug(VirtioBlk, options))

        yield make


@pytest.fixture(scope="session")
def start() -> Start:
    """``start(device, features=None)``: a guest on a plugged disk."""

    def started(device: Plugged[VirtioBlk], features: int | None = None) -> Guest:
        return Guest(device, MmioDriver.of(device), features)

    return started


@pytest.fixture
def guest(disk: Callable[..., Plugged[VirtioBlk]], start: Start) -> Guest:
    """A guest with everything negotiated on ``image``."""
    return start(disk())
