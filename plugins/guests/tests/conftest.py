"""Fixtures: a kernel package, and a machine whose apt is made up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_debian import FakeApt, kernel_files, make_deb


@pytest.fixture
def kernel_deb(tmp_path: Path) -> Path:
    """A kernel package."""
    return make_deb(tmp_path / "kernel.deb", kernel_files())


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    """A machine with the fake apt, and an empty cache."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("this machine has no dpkg-deb")
    apt = FakeApt(tmp_path / "apt")
    monkeypatch.setenv("PATH", f"{apt.root / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return apt
