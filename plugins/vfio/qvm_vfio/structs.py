"""Numbers and structures of <linux/vfio.h>, as far as PCI functions behind a type 1 IOMMU need them."""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

_BASE = ord(";") << 8 | 100

# On a container.
GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU = _BASE, _BASE + 1, _BASE + 2
IOMMU_MAP_DMA, IOMMU_UNMAP_DMA = _BASE + 13, _BASE + 14
# On a group.
GROUP_GET_STATUS, GROUP_SET_CONTAINER, GROUP_UNSET_CONTAINER = _BASE + 3, _BASE + 4, _BASE + 5
GROUP_GET_DEVICE_FD = _BASE + 6
# On a device.
DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, DEVICE_GET_IRQ_INFO = _BASE + 7, _BASE + 8, _BASE + 9
DEVICE_SET_IRQS, DEVICE_RESET = _BASE + 10, _BASE + 11
DEVICE_GET_PCI_HOT_RESET_INFO, DEVICE_PCI_HOT_RESET = _BASE + 12, _BASE + 13

API_VERSION = 0
TYPE1_IOMMU, TYPE1V2_IOMMU = 1, 3

GROUP_VIABLE, GROUP_CONTAINER_SET = 1, 2
DEVICE_HAS_RESET, DEVICE_IS_PCI = 1, 2
REGION_READ, REGION_WRITE, REGION_MMAP = 1, 2, 4
IRQ_EVENTFD, IRQ_MASKABLE, IRQ_AUTOMASKED, IRQ_NORESIZE = 1, 2, 4, 8
IRQ_DATA_NONE, IRQ_DATA_EVENTFD = 1, 4
IRQ_MASK, IRQ_UNMASK, IRQ_TRIGGER = 8, 16, 32
DMA_READ, DMA_WRITE = 1, 2

#: Region indices of a PCI function: BARs 0 to 5, expansion ROM, configuration space.
ROM_REGION, CONFIG_REGION = 6, 7
#: Interrupt indices of a PCI function.
INTX, MSI, MSIX = 0, 1, 2


class GroupStatus(ctypes.Structure):
    """struct vfio_group_status."""

    _fields_ = [("argsz", c_uint32), ("flags", c_uint32)]


class DeviceInfo(ctypes.Structure):
    """struct vfio_device_info, as the first version had it; a kernel fills in what argsz has room for."""

    _fields_ = [("argsz", c_uint32), ("flags", c_uint32), ("num_regions", c_uint32), ("num_irqs", c_uint32)]


class RegionInfo(ctypes.Structure):
    """struct vfio_region_info; size and offset in bytes."""

    _fields_ = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("index", c_uint32),
        ("cap_offset", c_uint32),
        ("size", c_uint64),
        ("offset", c_uint64),
    ]


class IrqInfo(ctypes.Structure):
    """struct vfio_irq_info."""

    _fields_ = [("argsz", c_uint32), ("flags", c_uint32), ("index", c_uint32), ("count", c_uint32)]


class IrqSet(ctypes.Structure):
    """struct vfio_irq_set, without the data behind it."""

    _fields_ = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("index", c_uint32),
        ("start", c_uint32),
        ("count", c_uint32),
    ]


class DependentDevice(ctypes.Structure):
    """struct vfio_pci_dependent_device: a function that a hot reset would reset as well."""

    _fields_ = [("group_id", c_uint32), ("segment", c_uint16), ("bus", c_uint8), ("devfn", c_uint8)]


class HotReset(ctypes.Structure):
    """struct vfio_pci_hot_reset and, alike, _hot_reset_info, without the array behind it."""

    _fields_ = [("argsz", c_uint32), ("flags", c_uint32), ("count", c_uint32)]


class DmaMap(ctypes.Structure):
    """struct vfio_iommu_type1_dma_map: memory of this process -> I/O virtual addresses, in bytes."""

    _fields_ = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("vaddr", c_uint64),
        ("iova", c_uint64),
        ("size", c_uint64),
    ]


class DmaUnmap(ctypes.Structure):
    """struct vfio_iommu_type1_dma_unmap, without the data behind it; size comes back as what was unmapped."""

    _fields_ = [("argsz", c_uint32), ("flags", c_uint32), ("iova", c_uint64), ("size", c_uint64)]
