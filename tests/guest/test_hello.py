"""The author's way: the README's vdev, built as a wheel, installed clean, driven by a real guest."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

VDEV = """
[[vdev]]
type = "hello"
name = "hello0"
loc = 0x1c0f0000
intr = "gic:43"
"""

#: Registers of hello, and bit 11 of the GIC's pending register for INTID 43 around one write.
SCRIPT = """
echo greeting $(devmem 0x1c0f0000 32)
devmem 0x08000c08 32 $(( $(devmem 0x08000c08 32) | 1 << 23 ))
echo pending $(( $(devmem 0x08000204 32) >> 11 & 1 ))
devmem 0x1c0f0004 32 0xcafe
echo pending $(( $(devmem 0x08000204 32) >> 11 & 1 ))
echo scratch $(devmem 0x1c0f0004 32)
devmem 0x1c0f0004 32 0xbeef
echo writes $(devmem 0x1c0f0008 32)
echo byte $(devmem 0x1c0f0000 8)
"""
EXPECTED = [
    "greeting 0x6F6C6568",
    "pending 0",
    "pending 1",
    "scratch 0x0000CAFE",
    "writes 0x00000002",
    "byte 0xFF",
]


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheels of everything, and hello."""
    folder = tmp_path_factory.mktemp("wheels")
    names = ["", *sorted(f"plugins/{path.parent.name}" for path in ROOT.glob("plugins/*/pyproject.toml"))]
    for name in [*names, "examples/qvm_hello"]:
        source = [sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", "-o", str(folder)]
        built = subprocess.run([*source, str(ROOT / name)], capture_output=True, text=True)
        assert built.returncode == 0, f"{name}: {built.stdout}{built.stderr}"
    target = folder / "venv"
    venv.create(target, with_pip=True)
    wheels = [str(path) for path in folder.glob("*.whl")]
    pip = [str(target / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, *wheels], capture_output=True, text=True)
    unreachable = "No matching distribution" in installed.stderr or "connection" in installed.stderr.lower()
    if unreachable and not os.environ.get("CI"):
        pytest.skip(f"the package index cannot be reached: {installed.stderr.strip()[:300]}")
    assert installed.returncode == 0, installed.stderr
    return target / "bin"


def test_the_wheels_in_a_clean_environment_list_hello(clean_environment: Path, tmp_path: Path) -> None:
    listed = subprocess.run(
        [clean_environment / "qvm", "plugins"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "hello" in listed.stdout
    assert "qvm-hello" in listed.stdout


def test_a_real_guest_drives_hello_from_the_clean_environment(
    start: Callable[..., Any], clean_environment: Path
) -> None:
    vm = start(SCRIPT, vdevs=VDEV, command=[str(clean_environment / "qvm")])
    assert vm.wait() == 0
    said = [
        line for line in vm.text.splitlines() if line.split(" ")[0] in {e.split(" ")[0] for e in EXPECTED}
    ]
    assert said == EXPECTED
