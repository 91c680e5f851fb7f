"""Numbers and structures are those of <linux/vfio.h>."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from qvm_vfio import structs

STRUCTS = {
    "struct vfio_group_status": structs.GroupStatus,
    "struct vfio_region_info": structs.RegionInfo,
    "struct vfio_irq_info": structs.IrqInfo,
    "struct vfio_irq_set": structs.IrqSet,
    "struct vfio_pci_dependent_device": structs.DependentDevice,
    "struct vfio_pci_hot_reset": structs.HotReset,
    "struct vfio_pci_hot_reset_info": structs.HotReset,
    "struct vfio_iommu_type1_dma_map": structs.DmaMap,
    "struct vfio_iommu_type1_dma_unmap": structs.DmaUnmap,
}
#: Offsets, also of a structure that has grown since.
FIELDS = {
    "struct vfio_device_info": (structs.DeviceInfo, ("argsz", "flags", "num_regions", "num_irqs")),
    "struct vfio_region_info": (structs.RegionInfo, ("flags", "index", "size", "offset")),
    "struct vfio_irq_info": (structs.IrqInfo, ("flags", "index", "count")),
    "struct vfio_irq_set": (structs.IrqSet, ("flags", "index", "start", "count")),
    "struct vfio_pci_dependent_device": (structs.DependentDevice, ("group_id", "segment", "bus", "devfn")),
    "struct vfio_pci_hot_reset": (structs.HotReset, ("argsz", "flags", "count")),
    "struct vfio_pci_hot_reset_info": (structs.HotReset, ("argsz", "flags", "count")),
    "struct vfio_iommu_type1_dma_map": (structs.DmaMap, ("flags", "vaddr", "iova", "size")),
    "struct vfio_iommu_type1_dma_unmap": (structs.DmaUnmap, ("flags", "iova", "size")),
}
NUMBERS = {
    "VFIO_API_VERSION": structs.API_VERSION,
    "VFIO_TYPE1_IOMMU": structs.TYPE1_IOMMU,
    "VFIO_TYPE1v2_IOMMU": structs.TYPE1V2_IOMMU,
    "VFIO_GET_API_VERSION": structs.GET_API_VERSION,
    "VFIO_CHECK_EXTENSION": structs.CHECK_EXTENSION,
    "VFIO_SET_IOMMU": structs.SET_IOMMU,
    "VFIO_IOMMU_MAP_DMA": structs.IOMMU_MAP_DMA,
    "VFIO_IOMMU_UNMAP_DMA": structs.IOMMU_UNMAP_DMA,
    "VFIO_GROUP_GET_STATUS": structs.GROUP_GET_STATUS,
    "VFIO_GROUP_SET_CONTAINER": structs.GROUP_SET_CONTAINER,
    "VFIO_GROUP_UNSET_CONTAINER": structs.GROUP_UNSET_CONTAINER,
    "VFIO_GROUP_GET_DEVICE_FD": structs.GROUP_GET_DEVICE_FD,
    "VFIO_DEVICE_GET_INFO": structs.DEVICE_GET_INFO,
    "VFIO_DEVICE_GET_REGION_INFO": structs.DEVICE_GET_REGION_INFO,
    "VFIO_DEVICE_GET_IRQ_INFO": structs.DEVICE_GET_IRQ_INFO,
    "VFIO_DEVICE_SET_IRQS": structs.DEVICE_SET_IRQS,
    "VFIO_DEVICE_RESET": structs.DEVICE_RESET,
    "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO": structs.DEVICE_GET_PCI_HOT_RESET_INFO,
    "VFIO_DEVICE_PCI_HOT_RESET": structs.DEVICE_PCI_HOT_RESET,
    "VFIO_GROUP_FLAGS_VIABLE": structs.GROUP_VIABLE,
    "VFIO_GROUP_FLAGS_CONTAINER_SET": structs.GROUP_CONTAINER_SET,
    "VFIO_DEVICE_FLAGS_RESET": structs.DEVICE_HAS_RESET,
    "VFIO_DEVICE_FLAGS_PCI": structs.DEVICE_IS_PCI,
    "VFIO_REGION_INFO_FLAG_READ": structs.REGION_READ,
    "VFIO_REGION_INFO_FLAG_WRITE": structs.REGION_WRITE,
    "VFIO_REGION_INFO_FLAG_MMAP": structs.REGION_MMAP,
    "VFIO_IRQ_INFO_EVENTFD": structs.IRQ_EVENTFD,
    "VFIO_IRQ_INFO_MASKABLE": structs.IRQ_MASKABLE,
    "VFIO_IRQ_INFO_AUTOMASKED": structs.IRQ_AUTOMASKED,
    "VFIO_IRQ_INFO_NORESIZE": structs.IRQ_NORESIZE,
    "VFIO_IRQ_SET_DATA_NONE": structs.IRQ_DATA_NONE,
    "VFIO_IRQ_SET_DATA_EVENTFD": structs.IRQ_DATA_EVENTFD,
    "VFIO_IRQ_SET_ACTION_MASK": structs.IRQ_MASK,
    "VFIO_IRQ_SET_ACTION_UNMASK": structs.IRQ_UNMASK,
    "VFIO_IRQ_SET_ACTION_TRIGGER": structs.IRQ_TRIGGER,
    "VFIO_DMA_MAP_FLAG_READ": structs.DMA_READ,
    "VFIO_DMA_MAP_FLAG_WRITE": structs.DMA_WRITE,
    "VFIO_PCI_BAR0_REGION_INDEX": 0,
    "VFIO_PCI_BAR5_REGION_INDEX": 5,
    "VFIO_PCI_ROM_REGION_INDEX": structs.ROM_REGION,
    "VFIO_PCI_CONFIG_REGION_INDEX": structs.CONFIG_REGION,
    "VFIO_PCI_INTX_IRQ_INDEX": structs.INTX,
    "VFIO_PCI_MSI_IRQ_INDEX": structs.MSI,
    "VFIO_PCI_MSIX_IRQ_INDEX": structs.MSIX,
}


def test_sizes_known_by_heart() -> None:
    """Also where there is no compiler."""
    sizes = {cls.__name__: ctypes.sizeof(cls) for cls in (*STRUCTS.values(), structs.DeviceInfo)}
    assert sizes == {
        "GroupStatus": 8,
        "DeviceInfo": 16,
        "RegionInfo": 32,
        "IrqInfo": 16,
        "IrqSet": 20,
        "DependentDevice": 8,
        "HotReset": 12,
        "DmaMap": 32,
        "DmaUnmap": 24,
    }
    assert structs.DEVICE_RESET == 0x3B6F


def test_everything_is_as_the_kernels_header_says(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/vfio.h").exists():
        pytest.skip("no C compiler, or no <linux/vfio.h>")
    wanted = dict(NUMBERS) | {f"sizeof({name})": ctypes.sizeof(cls) for name, cls in STRUCTS.items()}
    for name, (cls, fields) in FIELDS.items():
        for field in fields:
            # An anonymous union in the header, with the member a legacy container uses.
            wanted[f"offsetof({name}, {field})"] = getattr(cls, field).offset
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({name}));\n' for name in wanted)
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/vfio.h>\n"
        f"int main(void) {{\n{lines}return 0;\n}}\n"
    )
    program = tmp_path / "numbers"
    subprocess.run([compiler, "-o", program, source], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(wanted, map(int, printed), strict=True)) == wanted
