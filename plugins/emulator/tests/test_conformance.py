"""The contract of an engine, kept by the emulated one in both modes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import qvm_emulator.engine as engine_module
from qvm_emulator.engine import EmulatedEngine

from qvmcore.testing.engine_conformance import EngineConformance
from qvmcore.testing.guest_archs import Aarch64


class TestEmulated(EngineConformance):
    engine = EmulatedEngine()
    arch = Aarch64()
    widest = 4  # Unicorn cuts a wider access in two

    @pytest.fixture(autouse=True, params=["fast", "safe"])
    def mode(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Both modes."""
        monkeypatch.setenv(engine_module.MODE_VARIABLE, request.param)
        yield
