"""A server under attack."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hostile_kit import Target


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
