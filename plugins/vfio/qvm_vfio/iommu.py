"""A container, which is one IOMMU address space, and the group in it."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path

from qvm_vfio import errors, structs
from qvm_vfio.errors import VfioError, failed
from qvm_vfio.kernel import Kernel


class Container:
    """An IOMMU address space. ``fd`` is taken over when given. Any thread; raises VfioError."""

    def __init__(self, kernel: Kernel, fd: int | None = None) -> None:
        self._kernel = kernel
        self.fd = _open(kernel) if fd is None else fd

    def set_iommu(self) -> None:
        """Choose type 1, version 2 where the kernel has it; after the group came in."""
        try:
            new = self._kernel.ioctl(self.fd, structs.CHECK_EXTENSION, structs.TYPE1V2_IOMMU) > 0
            kind = structs.TYPE1V2_IOMMU if new else structs.TYPE1_IOMMU
            self._kernel.ioctl(self.fd, structs.SET_IOMMU, kind)
        except OSError as error:
            raise failed("the IOMMU cannot be used (type 1)", error) from error

    def map_dma(self, iova: int, size: int, address: int) -> None:
        """Devices reach ``size`` bytes of this process's memory at ``address`` as ``iova``; pins them."""
        flags = structs.DMA_READ | structs.DMA_WRITE
        wanted = structs.DmaMap(ctypes.sizeof(structs.DmaMap), flags, address, iova, size)
        try:
            self._kernel.ioctl(self.fd, structs.IOMMU_MAP_DMA, wanted)
        except OSError as error:
            raise failed(f"cannot map {size >> 20} MiB at {iova:#x} for DMA", error) from error

    def unmap_dma(self, iova: int, size: int) -> int:
        """Take a range away; how many bytes were mapped."""
        wanted = structs.DmaUnmap(ctypes.sizeof(structs.DmaUnmap), 0, iova, size)
        try:
            self._kernel.ioctl(self.fd, structs.IOMMU_UNMAP_DMA, wanted)
        except OSError as error:
            raise failed(f"cannot unmap {size >> 20} MiB at {iova:#x}", error) from error
        return int(wanted.size)

    def close(self) -> None:
        """Close the descriptor; the kernel unmaps all when nobody else has it. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self._kernel.close(fd)


class Group:
    """An IOMMU group, opened into a container. ``name`` is the function it is opened for."""

    def __init__(self, kernel: Kernel, name: str, number: int, fd: int | None = None) -> None:
        self._kernel = kernel
        self.number = number
        self.fd = _open_group(kernel, name, number) if fd is None else fd

    def join(self, container: Container) -> None:
        """Put the group into the container. Raises VfioError."""
        status = structs.GroupStatus(ctypes.sizeof(structs.GroupStatus))
        try:
            self._kernel.ioctl(self.fd, structs.GROUP_GET_STATUS, status)
            if not status.flags & structs.GROUP_VIABLE:
                raise VfioError(
                    f"IOMMU group {self.number} is not viable: a function in it has a driver of the host",
                    f"see /sys/kernel/iommu_groups/{self.number}/devices",
                )
            self._kernel.ioctl(self.fd, structs.GROUP_SET_CONTAINER, bytearray(_int(container.fd)))
        except OSError as error:
            raise failed(f"IOMMU group {self.number} cannot be used", error) from error

    def device(self, name: str) -> int:
        """The descriptor of one function of the group. Raises VfioError."""
        try:
            return self._kernel.ioctl(self.fd, structs.GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0"))
        except OSError as error:
            raise failed(f"{name} cannot be opened", error) from error

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self._kernel.close(fd)


def _int(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def _open(kernel: Kernel) -> int:
    path = kernel.dev / "vfio"
    try:
        fd = kernel.open(path)
    except FileNotFoundError:
        raise errors.not_here() from None
    except PermissionError:
        raise errors.permission("VFIO", str(path)) from None
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise errors.not_here() from None
        raise failed(f"cannot open {path}", error) from error
    try:
        version = kernel.ioctl(fd, structs.GET_API_VERSION)
    except OSError as error:
        kernel.close(fd)
        raise failed(f"{path} is not VFIO", error) from error
    if version != structs.API_VERSION:
        kernel.close(fd)
        raise VfioError(f"VFIO here has version {version}, not {structs.API_VERSION}")
    return fd


def _open_group(kernel: Kernel, name: str, number: int) -> int:
    path = kernel.dev / str(number)
    try:
        return kernel.open(path)
    except PermissionError:
        raise errors.permission(name, str(path)) from None
    except FileNotFoundError:
        raise VfioError(f"{name}: there is no {path}", "in a container, pass /dev/vfio in") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise errors.busy(name, number, _holders(kernel, path)) from None
        raise failed(f"{name}: cannot open {path}", error) from error


def _holders(kernel: Kernel, path: Path) -> list[int]:
    """The processes that have the group open, as far as we may see them."""
    found = []
    for link in kernel.proc.glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == path:
                found.append(int(link.parts[-3]))
        except OSError:
            continue  # another user's process, or one that has just ended
    return sorted(set(found))
