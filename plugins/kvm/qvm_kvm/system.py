"""/dev/kvm: open it, ask what it can do, and say why it cannot be used and what to do about it."""

from __future__ import annotations

import errno
import grp
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from qvm_kvm import ioctls
from qvm_kvm.ioctls import ioctl
from qvmcore.api import EngineError

DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")

#: What the engine needs on any architecture, by the kernel's names.
NEEDED: Mapping[str, int] = {
    "KVM_CAP_IRQCHIP": ioctls.CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": ioctls.CAP_USER_MEMORY,
    "KVM_CAP_IRQ_ROUTING": ioctls.CAP_IRQ_ROUTING,
    "KVM_CAP_IRQFD": ioctls.CAP_IRQFD,
    "KVM_CAP_IOEVENTFD": ioctls.CAP_IOEVENTFD,
    "KVM_CAP_SIGNAL_MSI": ioctls.CAP_SIGNAL_MSI,
    "KVM_CAP_READONLY_MEM": ioctls.CAP_READONLY_MEM,
    "KVM_CAP_IMMEDIATE_EXIT": ioctls.CAP_IMMEDIATE_EXIT,
}


class KvmSystem:
    """An open /dev/kvm of the right version. Raises EngineError with the reason and the fix.

    ``needed`` are capabilities beyond :data:`NEEDED`. A context manager; close is idempotent.
    """

    def __init__(self, needed: Mapping[str, int] | None = None) -> None:
        self.fd = -1
        try:
            self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot_open(error) from error
        try:
            self._check({**NEEDED, **(needed or {})})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> KvmSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, needed: Mapping[str, int]) -> None:
        try:
            version = ioctl(self.fd, ioctls.GET_API_VERSION)
        except OSError as error:
            raise EngineError(
                f"{DEVICE} is not KVM: {error.strerror}", hint="look at it with: ls -l /dev/kvm"
            ) from error
        if version != ioctls.API_VERSION:
            raise EngineError(
                f"{DEVICE} speaks version {version} of the KVM interface, not {ioctls.API_VERSION}",
                hint="use a kernel from 2.6.22 on",
            )
        missing = [name for name, number in needed.items() if not self.capability(number)]
        if missing:
            raise EngineError(f"KVM here lacks {', '.join(missing)}", hint="use a newer kernel")

    def capability(self, number: int) -> int:
        """What KVM_CHECK_EXTENSION says: 0 = no, 1 = yes, or a limit."""
        return ioctl(self.fd, ioctls.CHECK_EXTENSION, number)

    @property
    def max_vcpus(self) -> int:
        """How many vCPUs one VM may have."""
        return self.capability(ioctls.CAP_MAX_VCPUS) or self.capability(ioctls.CAP_NR_VCPUS) or 4

    @property
    def run_size(self) -> int:
        """Bytes of the page or pages a vCPU shares with us."""
        return ioctl(self.fd, ioctls.GET_VCPU_MMAP_SIZE)

    def create_vm(self) -> int:
        """The descriptor of a new, empty VM. Raises EngineError."""
        while True:
            try:
                return ioctl(self.fd, ioctls.CREATE_VM)
            except InterruptedError:
                continue
            except OSError as error:
                raise _cannot_create(error) from error

    def close(self) -> None:
        """Close it; what was created from it lives on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _cannot_open(error: OSError) -> EngineError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return EngineError(f"no permission to open {DEVICE}", hint=_permission_hint())
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        missing = "there is no /dev/kvm" if error.errno == errno.ENOENT else "nothing is behind /dev/kvm"
        return EngineError(missing, hint=_module_hint())
    return EngineError(f"cannot open {DEVICE}: {error.strerror}")


def _permission_hint() -> str:
    try:
        status = DEVICE.stat()
        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        return "ask who runs this machine for access to it"
    if status.st_gid == 0 or status.st_mode & 0o060 != 0o060:
        return "its group may not open it either: sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm"
    if status.st_gid in os.getgroups():
        return f"you are in its group {group}; something else forbids it, such as a container"
    return f"join its group and log in again: sudo usermod -aG {group} $USER"


def _module_hint() -> str:
    try:
        words = set(CPUINFO.read_text(errors="replace").split())
    except OSError:
        words = set()
    if "vmx" in words:
        return "load the module: sudo modprobe kvm_intel"
    if "svm" in words:
        return "load the module: sudo modprobe kvm_amd"
    return (
        "this CPU offers no virtualization (no vmx or svm in /proc/cpuinfo): turn it on in the firmware "
        "or, in a virtual machine, have its host offer nested virtualization; in a container, pass "
        "/dev/kvm in"
    )


def _cannot_create(error: OSError) -> EngineError:
    hint = ""
    if error.errno == errno.EBUSY:
        hint = "another hypervisor (VirtualBox, VMware) may hold the CPU's virtualization; stop it"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "close some files, or raise the limit: ulimit -n"
    elif error.errno == errno.ENOMEM:
        hint = "free some memory"
    return EngineError(f"KVM cannot create a VM: {error.strerror}", hint=hint)
