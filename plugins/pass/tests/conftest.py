"""A host with a physical function that is not there, and the vdev on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from qvm_pass.device import Pass
from qvm_vfio.fake import FakeFunction, FakeKernel

from qvmcore.testing.fakes import Plugged, plug

NAME = "0000:03:00.0"
Host = Callable[..., FakeKernel]
Plug = Callable[..., Plugged[Pass]]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is quarantined, and records go to a folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/qvm/quiesce"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """``host(function, ...)``: this machine has these functions, by default one."""
    made: list[FakeKernel] = []

    def make(*functions: FakeFunction) -> FakeKernel:
        made.append(FakeKernel(tmp_path / f"host{len(made)}", functions or (FakeFunction(),)))
        monkeypatch.setattr(Pass, "kernel", made[-1])
        return made[-1]

    yield make
    for kernel in made:
        kernel.close_all()


@pytest.fixture
def passed(host: Host) -> Iterator[Plug]:
    """``passed(function, ...)``: the first one is passed to a guest whose firmware has run."""
    with ExitStack() as stack:

        def make(*functions: FakeFunction, start: bool = True, **options: Any) -> Plugged[Pass]:
            host(*functions)
            device = f"pci:{functions[0].name if functions else NAME}"
            return stack.enter_context(plug(Pass, {"device": device, **options}, start=start))

        yield make
