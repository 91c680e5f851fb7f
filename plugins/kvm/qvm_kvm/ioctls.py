"""Numbers of <linux/kvm.h> every architecture shares, and ``ioctl`` by ctypes.

``fcntl.ioctl`` will not do: it takes a signed 32-bit argument, and KVM takes addresses.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from qvm_kvm import structs


def _number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


def io(number: int) -> int:
    """_IO(KVMIO, number): the argument is a plain number, or nothing."""
    return _number(0, number, 0)


def iow(number: int, size: int) -> int:
    """_IOW(KVMIO, number, type of ``size`` bytes)."""
    return _number(1, number, size)


def ior(number: int, size: int) -> int:
    """_IOR(KVMIO, number, type of ``size`` bytes)."""
    return _number(2, number, size)


def iowr(number: int, size: int) -> int:
    """_IOWR(KVMIO, number, type of ``size`` bytes)."""
    return _number(3, number, size)


# On /dev/kvm.
GET_API_VERSION = io(0x00)
CREATE_VM = io(0x01)
CHECK_EXTENSION = io(0x03)
GET_VCPU_MMAP_SIZE = io(0x04)
# On a VM.
CREATE_VCPU = io(0x41)
GET_DIRTY_LOG = iow(0x42, ctypes.sizeof(structs.DirtyLog))
SET_USER_MEMORY_REGION = iow(0x46, ctypes.sizeof(structs.MemorySlot))
CREATE_IRQCHIP = io(0x60)
IRQ_LINE = iow(0x61, ctypes.sizeof(structs.IrqLevel))
SET_GSI_ROUTING = iow(0x6A, ctypes.sizeof(structs.RoutingHeader))
IRQFD = iow(0x76, ctypes.sizeof(structs.IrqFd))
IOEVENTFD = iow(0x79, ctypes.sizeof(structs.IoEventFd))
SIGNAL_MSI = iow(0xA5, ctypes.sizeof(structs.Msi))
# On a vCPU.
RUN = io(0x80)

API_VERSION = 12

# Capabilities.
CAP_IRQCHIP = 0
CAP_USER_MEMORY = 3
CAP_NR_VCPUS = 9
CAP_IRQ_ROUTING = 25
CAP_IRQFD = 32
CAP_IOEVENTFD = 36
CAP_MAX_VCPUS = 66
CAP_SIGNAL_MSI = 77
CAP_READONLY_MEM = 81
CAP_IRQFD_RESAMPLE = 82
CAP_IMMEDIATE_EXIT = 136

MEM_LOG_DIRTY_PAGES = 1
MEM_READONLY = 2

IRQFD_DEASSIGN = 1
IRQFD_RESAMPLE = 2
IOEVENTFD_DATAMATCH = 1
IOEVENTFD_PIO = 2
IOEVENTFD_DEASSIGN = 4

ROUTE_IRQCHIP = 1
ROUTE_MSI = 2

libc = ctypes.CDLL(None, use_errno=True)

#: ``ioctl`` itself, which gives -1 and leaves the error in ``ctypes.get_errno()``. ctypes drops the GIL
#: around the call, so other Python threads run while a vCPU is in the guest.
raw_ioctl: Any = libc["ioctl"]
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
raw_ioctl.restype = ctypes.c_int

#: The same for the one call that counts, for arguments that are ctypes objects already.
untyped_ioctl: Any = libc["ioctl"]


def ioctl(fd: int, request: int, argument: int = 0) -> int:
    """A call with a number. Raises OSError."""
    result: int = raw_ioctl(fd, request, argument)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def ioctl_struct(fd: int, request: int, argument: ctypes.Structure | ctypes.Array[Any]) -> int:
    """A call with a structure, which the kernel reads, fills in, or both. Raises OSError."""
    return ioctl(fd, request, ctypes.addressof(argument))
