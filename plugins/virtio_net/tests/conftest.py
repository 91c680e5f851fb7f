"""Cards on cables, and guests that drive them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.testing import Guest

from qvmcore.testing.fakes import Plugged, plug


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Callable[..., Plugged[VirtioNet]]]:
    """``card(**options)``: a plugged card, ended after the test; its folder is ``tmp_path``."""
    with ExitStack() as stack:

        def make(**options: object) -> Plugged[VirtioNet]:
            return stack.enter_context(plug(VirtioNet, options, base_dir=tmp_path))

        yield make


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], None]:
    """``until(condition)``: wait for it; fails after long enough."""

    def wait(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.005)

    return wait


@pytest.fixture
def pair(
    card: Callable[..., Plugged[VirtioNet]], until: Callable[[Callable[[], Any]], None]
) -> Callable[..., tuple[Guest, Guest]]:
    """``pair(features_a=None, features_b=None, **options)``: two guests on one cable, which is in."""

    def make(
        features_a: int | None = None, features_b: int | None = None, **options: object
    ) -> tuple[Guest, Guest]:
        one = card(peer="./lan0", mac="02:00:00:00:00:0a", **options)
        two = card(peer="./lan0", mac="02:00:00:00:00:0b", **options)
        guests = Guest(one, features_a), Guest(two, features_b)
        until(lambda: all(guest.link_up for guest in guests))
        return guests

    return make
