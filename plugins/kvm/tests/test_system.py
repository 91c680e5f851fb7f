"""/dev/kvm: what is wrong and what to do, in words. Failures are injected; no KVM is needed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qvm_kvm import engine, ioctls, system
from qvm_kvm.engine import KvmEngine

from qvmcore.api import EngineError


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A host whose /dev/kvm and /proc/cpuinfo are files of the test, and an ioctl that answers well."""
    answers: dict[int, Any] = {ioctls.GET_API_VERSION: 12, ioctls.CHECK_EXTENSION: 1}
    missing: set[int] = set()
    device, cpuinfo = tmp_path / "kvm", tmp_path / "cpuinfo"
    device.touch()
    cpuinfo.write_text("flags : fpu vme\n")

    def ioctl(_fd: int, request: int, argument: int = 0) -> int:
        if request == ioctls.CHECK_EXTENSION and argument in missing:
            return 0
        answer = answers.get(request, 0)
        if request == ioctls.CREATE_VM and not isinstance(answer, OSError):
            return os.open("/dev/null", os.O_RDONLY)
        if isinstance(answer, OSError):
            raise answer
        return int(answer)

    monkeypatch.setattr(system, "DEVICE", device)
    monkeypatch.setattr(system, "CPUINFO", cpuinfo)
    monkeypatch.setattr(system, "ioctl", ioctl)
    monkeypatch.setattr(engine, "platform", SimpleNamespace(machine=lambda: "x86_64"))
    return SimpleNamespace(answers=answers, missing=missing, device=device, cpuinfo=cpuinfo)


def why() -> str:
    return KvmEngine().unusable("x86_64")


def test_a_good_host(here: Any) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    assert why() == ""
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("fpu vmx", "load the module: sudo modprobe kvm_intel"),
        ("fpu svm", "load the module: sudo modprobe kvm_amd"),
        (
            "fpu",
            "this CPU offers no virtualization (no vmx or svm in /proc/cpuinfo): turn it on in the firmware",
        ),
    ],
)
def test_no_device(here: Any, flags: str, hint: str) -> None:
    here.device.unlink()
    here.cpuinfo.write_text(f"flags : {flags}\n")
    assert why().startswith(f"there is no /dev/kvm; {hint}")


def test_a_device_without_a_module(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.os, "open", _raise(errno.ENODEV))
    here.cpuinfo.write_text("flags : svm\n")
    assert why() == "nothing is behind /dev/kvm; load the module: sudo modprobe kvm_amd"


def _raise(number: int) -> Any:
    def function(*_args: object) -> int:
        raise OSError(number, os.strerror(number))

    return function


@pytest.mark.parametrize(
    ("mode", "gid", "groups", "hint"),
    [
        (0o660, 104, (), "join its group and log in again: sudo usermod -aG kvm $USER"),
        (
            0o600,
            104,
            (),
            "its group may not open it either: sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm",
        ),
        (
            0o660,
            0,
            (),
            "its group may not open it either: sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm",
        ),
        (0o660, 104, (104,), "you are in its group kvm; something else forbids it, such as a container"),
    ],
)
def test_no_permission(
    here: Any, monkeypatch: pytest.MonkeyPatch, mode: int, gid: int, groups: tuple[int, ...], hint: str
) -> None:
    status = SimpleNamespace(st_gid=gid, st_mode=stat.S_IFCHR | mode)
    device = SimpleNamespace(stat=lambda: status)
    monkeypatch.setattr(
        system, "DEVICE", type("D", (), {"stat": device.stat, "__str__": lambda _s: "/dev/kvm"})()
    )
    monkeypatch.setattr(type(system.DEVICE), "stat", lambda _s: status)
    monkeypatch.setattr(system.os, "open", _raise(errno.EACCES))
    monkeypatch.setattr(system.os, "getgroups", lambda: list(groups))
    monkeypatch.setattr(system.grp, "getgrgid", lambda _gid: SimpleNamespace(gr_name="kvm"))
    assert why() == f"no permission to open /dev/kvm; {hint}"


def test_another_version(here: Any) -> None:
    here.answers[ioctls.GET_API_VERSION] = 11
    assert why().endswith("speaks version 11 of the KVM interface, not 12; use a kernel from 2.6.22 on")


def test_a_device_that_is_not_kvm(here: Any) -> None:
    here.answers[ioctls.GET_API_VERSION] = OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    assert "is not KVM: Inappropriate ioctl" in why()


def test_missing_capabilities_are_named(here: Any) -> None:
    here.missing |= {ioctls.CAP_IRQFD, ioctls.CAP_IMMEDIATE_EXIT}
    assert why() == "KVM here lacks KVM_CAP_IRQFD, KVM_CAP_IMMEDIATE_EXIT; use a newer kernel"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EBUSY, "KVM cannot create a VM: Device or resource busy; another hypervisor"),
        (errno.ENOMEM, "KVM cannot create a VM: Cannot allocate memory; free some memory"),
        (errno.EMFILE, "KVM cannot create a VM: Too many open files; close some files"),
        (errno.EINVAL, "KVM cannot create a VM: Invalid argument"),
    ],
)
def test_no_vm(here: Any, number: int, text: str) -> None:
    here.answers[ioctls.CREATE_VM] = OSError(number, os.strerror(number))
    assert why().startswith(text)


@pytest.mark.parametrize(
    ("host", "arch", "text"),
    [
        ("x86_64", "aarch64", "KVM runs guests of the host's architecture, x86_64, not aarch64"),
        ("aarch64", "x86_64", "KVM runs guests of the host's architecture, aarch64, not x86_64"),
        ("aarch64", "aarch64", "the kvm engine is built for x86_64 so far, not aarch64"),
    ],
)
def test_other_architectures(monkeypatch: pytest.MonkeyPatch, host: str, arch: str, text: str) -> None:
    monkeypatch.setattr(engine, "platform", SimpleNamespace(machine=lambda: host))
    assert KvmEngine().unusable(arch) == text
    with pytest.raises(EngineError, match=text):
        KvmEngine().create_guest(SimpleNamespace(arch=arch))  # type: ignore[arg-type]


def test_a_refused_device_is_closed(here: Any) -> None:
    here.answers[ioctls.GET_API_VERSION] = 11
    before = sorted(os.listdir("/proc/self/fd"))
    assert why()
    assert sorted(os.listdir("/proc/self/fd")) == before
