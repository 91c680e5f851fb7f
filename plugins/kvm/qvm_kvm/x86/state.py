"""Registers of a vCPU by name, for dumps and for people."""

from __future__ import annotations

from collections.abc import Mapping

from qvm_kvm.ioctls import ioctl_struct
from qvm_kvm.x86 import abi
from qvmcore.api import GuestMemory, GuestMemoryError

#: The longest instruction of x86.
_INSTRUCTION = 15


def registers(vcpu_fd: int) -> dict[str, int]:
    """All of them; waits for a vCPU that is in the guest. Raises OSError."""
    regs, sregs = abi.Regs(), abi.Sregs()
    ioctl_struct(vcpu_fd, abi.GET_REGS, regs)
    ioctl_struct(vcpu_fd, abi.GET_SREGS, sregs)
    found = {name: getattr(regs, name) for name in abi.GENERAL}
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        found[name] = getattr(sregs, name).selector
    found["fs_base"], found["gs_base"] = sregs.fs.base, sregs.gs.base
    found["cs_base"] = sregs.cs.base
    for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
        found[name] = getattr(sregs, name)
    return found


def code_at(vcpu_fd: int, memory: GuestMemory, values: Mapping[str, int]) -> bytes:
    """The bytes the vCPU was executing, as far as they are in guest memory."""
    address = values.get("cs_base", 0) + values.get("rip", 0)
    where = abi.Translation(linear_address=address)
    try:
        ioctl_struct(vcpu_fd, abi.TRANSLATE, where)
    except OSError:
        return b""
    if not where.valid:
        return b""
    for size in range(_INSTRUCTION, 0, -1):
        try:
            return memory.read(where.physical_address, size)
        except GuestMemoryError:
            continue  # the end of memory is near
    return b""
