"""Nothing grows: memory over many requests, descriptors and threads over many lives of a device.

A million requests and 200 lives: ``python tests/bench/leak.py``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def leak() -> ModuleType:
    """The bench, as it is run by hand."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("leak", BENCH / "leak.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_50_000_requests_leave_no_memory(leak: ModuleType, packed: bool) -> None:
    with leak.disk(True) as device:
        assert leak.growth(leak.queue_batch(device, packed), 50_000 // leak.DEPTH) <= leak.SLACK


def test_the_lives_of_a_device_leave_no_descriptor_and_no_thread(leak: ModuleType) -> None:
    assert leak.left(lambda: leak.disk(True), 20) == (0, 0)
