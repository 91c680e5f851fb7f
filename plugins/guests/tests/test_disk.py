"""The ext4 images of `qvm guest disk`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from qvm_guests import disk

from qvmcore.api import HostError, QvmError


def _tool(name: str) -> str:
    tool = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if tool is None:
        pytest.skip(f"this machine has no {name} (package e2fsprogs)")
    return tool


def test_make(tmp_path: Path) -> None:
    _tool("mke2fs")
    debugfs = _tool("debugfs")
    (tmp_path / "a").write_text("content\n")
    image = tmp_path / "disk.img"
    disk.make(image, 16 << 20, {"dir/name": tmp_path / "a"})
    assert image.stat().st_size == 16 << 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "disk.img"]
    done = subprocess.run([debugfs, "-R", "cat dir/name", image], capture_output=True, text=True, check=True)
    assert done.stdout == "content\n"


def test_what_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    _tool("mke2fs")
    (tmp_path / "a").write_bytes(bytes(range(256)) * (4 << 12))
    with pytest.raises(HostError, match=r"cannot make .*--size"):
        disk.make(tmp_path / "disk.img", 2 << 20, {"a": tmp_path / "a"})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_missing_file(tmp_path: Path) -> None:
    _tool("mke2fs")
    with pytest.raises(HostError, match=r"cannot read .*nowhere: No such file"):
        disk.make(tmp_path / "disk.img", 2 << 20, {"a": tmp_path / "nowhere"})


def test_no_mke2fs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(HostError, match=r"install the package e2fsprogs"):
        disk.make(tmp_path / "disk.img", 2 << 20, {})


@pytest.mark.parametrize(("text", "size"), [("64M", 64 << 20), ("1g", 1 << 30), ("2048K", 2 << 20)])
def test_sizes(text: str, size: int) -> None:
    assert disk.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64", "0M", "-1M", "64MB", "big"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(QvmError, match=r"is not a size"):
        disk.parse_size(text)


@pytest.mark.parametrize("text", ["name", "=path", "name=", "../x=path", "/abs=path"])
def test_bad_files(text: str) -> None:
    with pytest.raises(QvmError, match=r"NAME=PATH"):
        disk.parse_file(text)
