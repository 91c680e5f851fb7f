"""The structures of <linux/kvm.h> this engine passes to the kernel, those of every architecture."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint32, c_uint64


class MemorySlot(ctypes.Structure):
    """struct kvm_userspace_memory_region: guest-physical range -> memory of this process, in bytes."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class DirtyLog(ctypes.Structure):
    """struct kvm_dirty_log: where the bitmap of a slot goes, one bit a page."""

    _fields_ = [("slot", c_uint32), ("padding", c_uint32), ("dirty_bitmap", c_uint64)]


class IrqLevel(ctypes.Structure):
    """struct kvm_irq_level: a level on a GSI."""

    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class IrqFd(ctypes.Structure):
    """struct kvm_irqfd: an eventfd that raises a GSI as an edge."""

    _fields_ = [
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class IoEventFd(ctypes.Structure):
    """struct kvm_ioeventfd: an eventfd signalled by a guest write."""

    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class Msi(ctypes.Structure):
    """struct kvm_msi: one message."""

    _fields_ = [
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    ]


class _RouteToChip(ctypes.Structure):
    _fields_ = [("irqchip", c_uint32), ("pin", c_uint32)]


class _RouteToMsi(ctypes.Structure):
    _fields_ = [("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("devid", c_uint32)]


class _RouteTarget(ctypes.Union):
    _fields_ = [("irqchip", _RouteToChip), ("msi", _RouteToMsi), ("pad", c_uint32 * 8)]


class Route(ctypes.Structure):
    """struct kvm_irq_routing_entry: where a GSI goes; several entries of a GSI all get it."""

    _fields_ = [
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", _RouteTarget),
    ]


class RoutingHeader(ctypes.Structure):
    """struct kvm_irq_routing, without the entries behind it."""

    _fields_ = [("nr", c_uint32), ("flags", c_uint32)]
