"""The engine: what it refuses and which mode it chooses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import qvm_emulator.engine as engine_module
from qvm_emulator import qvm_engines
from qvm_emulator.engine import EmulatedEngine, choose_cpu
from qvm_emulator.fast import FastCpu
from qvm_emulator.internals import Unsuitable
from qvm_emulator.program import Slot
from qvm_emulator.safe import SafeCpu
from qvm_emulator.selftest import fast_mode_problem, problems
from qvm_emulator.trial import Result, run_trial

from qvmcore.api import EngineError, Reason


def _config(**changes: object) -> Any:
    return cast(Any, SimpleNamespace(**{"arch": "aarch64", "cpus": 1, "controllers": (), **changes}))


def test_is_offered_under_its_name() -> None:
    assert [engine.name for engine in qvm_engines()] == ["emulated"]


def test_importing_the_package_does_not_import_unicorn() -> None:
    code = "import sys, qvm_emulator; qvm_emulator.qvm_engines(); print('unicorn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_refusals() -> None:
    engine = EmulatedEngine()
    assert engine.unusable("aarch64") == ""
    assert "not x86_64" in engine.unusable("x86_64")
    with pytest.raises(EngineError, match="not x86_64"):
        engine.create_guest(_config(arch="x86_64"))
    with pytest.raises(EngineError, match="one CPU per guest, not 2"):
        engine.create_guest(_config(cpus=2))
    with pytest.raises(EngineError, match="one gicv2 interrupt controller, got none"):
        engine.create_guest(_config())


def test_fast_mode_is_chosen_when_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(engine_module.MODE_VARIABLE, raising=False)
    assert choose_cpu() is (SafeCpu if fast_mode_problem() else FastCpu)


def test_safe_mode_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine_module, "_reported", False)
    monkeypatch.setenv(engine_module.MODE_VARIABLE, "safe")
    assert choose_cpu() is SafeCpu
    assert choose_cpu() is SafeCpu
    assert capsys.readouterr().err.count("safe mode") == 1
    monkeypatch.setenv(engine_module.MODE_VARIABLE, "quick")
    with pytest.raises(EngineError, match="'fast' or 'safe'"):
        choose_cpu()


def test_unknown_build_falls_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qvm_emulator.internals.LAYOUTS", {})
    monkeypatch.setattr(engine_module, "_reported", False)
    monkeypatch.delenv(engine_module.MODE_VARIABLE, raising=False)
    fast_mode_problem.cache_clear()
    try:
        assert choose_cpu() is SafeCpu
        assert "no verified layout" in capsys.readouterr().err
        monkeypatch.setenv(engine_module.MODE_VARIABLE, "fast")
        with pytest.raises(EngineError, match="no verified layout"):
            choose_cpu()
    finally:
        fast_mode_problem.cache_clear()


def test_a_layout_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from qvm_emulator import internals

    key = next(iter(internals.LAYOUTS))
    monkeypatch.setitem(internals.LAYOUTS, key, replace(internals.LAYOUTS[key], fingerprint=(1, 2, 3)))
    with pytest.raises(Unsuitable, match="another build"):
        run_trial(FastCpu, loops=10, patches=1)


def test_selftest_finds_what_is_wrong() -> None:
    good = run_trial(SafeCpu, loops=1_000, patches=5)
    assert problems(good, 1_000) == []
    assert "COUNT" in problems(good, 1_001)[0]
    stale = Result(good.end, {**good.words, Slot.STALE: 3}, good.pulses)
    assert problems(stale, 1_000) == ["STALE is 0x3, not 0x0"]
    assert "did not end" in problems(Result(None, good.words, 0), 1_000)[0]
    assert good.end is not None
    assert good.end.reason is Reason.GUEST_SHUTDOWN


def test_selftest_notices_missing_cache_maintenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastCpu, "_patch_caches", lambda self: None)
    found = problems(run_trial(FastCpu, loops=10_000, patches=64), 10_000)
    assert len(found) == 1
    assert "STALE" in found[0]


def test_a_busy_host_does_not_fail_the_selftest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty seconds have passed before the test guest got far: that is no fault of the core."""
    passed = itertools.chain([0.0], itertools.repeat(20.0))
    monkeypatch.setattr("qvm_emulator.trial.time", SimpleNamespace(monotonic=lambda: next(passed)))
    assert problems(run_trial(SafeCpu, loops=1_000, patches=5), 1_000) == []


def test_an_interrupted_selftest_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a second Ctrl-C while a VM starts."""
    interrupts = itertools.count()

    def monotonic() -> float:
        if next(interrupts):
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr("qvm_emulator.trial.time", SimpleNamespace(monotonic=monotonic))
    threads, fds = set(threading.enumerate()), os.listdir("/proc/self/fd")
    with pytest.raises(KeyboardInterrupt):
        run_trial(SafeCpu, loops=1 << 40, patches=5)
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= len(fds)
