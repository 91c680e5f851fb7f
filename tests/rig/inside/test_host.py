"""The machine of the rig is what the other tests need: hardware virtualization, with nested paging."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

KVM_GET_API_VERSION, KVM_CREATE_VM = 0xAE00, 0xAE01


def test_the_machine_has_svm_and_kvm_amd() -> None:
    assert {"svm", "npt"} <= set(Path("/proc/cpuinfo").read_text().split())
    assert Path("/sys/module/kvm_amd/parameters/npt").read_text().strip() in ("1", "Y")


def test_a_vm_can_be_created() -> None:
    with open("/dev/kvm", "r+b", buffering=0) as kvm:
        assert fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0) == 12
        assert fcntl.ioctl(kvm, KVM_CREATE_VM, 0) > 2


def test_doctor_finds_kvm_usable() -> None:
    command = [sys.executable, "-m", "qvmcore", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    engines = json.loads(done.stdout)["engines"]
    (kvm,) = [row for row in engines if (row["engine"], row["arch"]) == ("kvm", "x86_64")]
    assert kvm["problem"] == ""


def test_python_s_code_came_compiled() -> None:
    """Compiling takes seconds here, in every `qvm run`."""
    if sys.pycache_prefix is not None:
        pytest.skip("the Python outside is of another version, so its compiled code was of no use here")
    command = [sys.executable, "-v", "-m", "qvmcore", "plugins", "--load"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "/site/qvmcore/__pycache__/" in done.stderr
    slow = [line for line in done.stderr.splitlines() if line.startswith("# code object from '")]
    slow = [line for line in slow if not line.split("'")[1].endswith(".pyc")]
    assert slow == []
