"""Consoles on host devices under ``tmp_path``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from qvm_virtio_console.device import VirtioConsole

from qvmcore.testing.fakes import Plugged, plug


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Callable[..., Plugged[VirtioConsole]]]:
    """``console(**options)``: a plugged device; relative paths start at ``tmp_path``."""
    with ExitStack() as stack:

        def make(**options: object) -> Plugged[VirtioConsole]:
            return stack.enter_context(plug(VirtioConsole, options, base_dir=tmp_path))

        yield make
