"""One PCI function by its VFIO descriptor: configuration space, BARs, interrupts, resets."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Sequence
from typing import NamedTuple

from qvm_vfio import structs
from qvm_vfio.errors import VfioError, failed
from qvm_vfio.kernel import Kernel

_SIZES = (1, 2, 4, 8)
#: Functions one bus can have.
_MOST_DEPENDENT = 256


class Region(NamedTuple):
    """A region of the descriptor, in bytes; ``flags`` are REGION_*."""

    flags: int
    size: int
    offset: int


class VfioDevice:
    """Takes ``fd`` over. Any thread; methods raise VfioError, also when it is closed."""

    def __init__(self, kernel: Kernel, name: str, fd: int) -> None:
        self.name = name
        self._kernel = kernel
        self.fd = fd
        info = structs.DeviceInfo(ctypes.sizeof(structs.DeviceInfo))
        self._ioctl("is not a VFIO device", structs.DEVICE_GET_INFO, info)
        if not info.flags & structs.DEVICE_IS_PCI:
            raise VfioError(f"{name} is not a PCI function")
        self.has_reset = bool(info.flags & structs.DEVICE_HAS_RESET)
        self.regions = {
            index: region
            for index in range(min(info.num_regions, structs.CONFIG_REGION + 1))
            if (region := self._region(index)) is not None and region.size
        }
        self.irqs = {index: self._irq_count(index) for index in range(min(info.num_irqs, structs.MSIX + 1))}
        if structs.CONFIG_REGION not in self.regions:
            raise VfioError(f"{name} has no configuration space")

    # -- registers ---------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """Bytes of configuration space, as VFIO virtualises it."""
        return self.read(structs.CONFIG_REGION, offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write to it."""
        self.write(structs.CONFIG_REGION, offset, size, value)

    def read(self, index: int, offset: int, size: int) -> int:
        """``size`` (1, 2, 4, 8) bytes of a region, unsigned."""
        region = self._inside(index, offset, size)
        try:
            data = self._kernel.pread(self._open_fd(), size, region.offset + offset)
        except OSError as error:
            raise failed(f"{self.name}: read of region {index} at {offset:#x}", error) from error
        if len(data) != size:
            raise VfioError(f"{self.name}: region {index} at {offset:#x} gave {len(data)} bytes, not {size}")
        return int.from_bytes(data, "little")

    def write(self, index: int, offset: int, size: int, value: int) -> None:
        """Write to a region."""
        region = self._inside(index, offset, size)
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        try:
            written = self._kernel.pwrite(self._open_fd(), data, region.offset + offset)
        except OSError as error:
            raise failed(f"{self.name}: write of region {index} at {offset:#x}", error) from error
        if written != size:
            raise VfioError(f"{self.name}: region {index} at {offset:#x} took {written} bytes, not {size}")

    def map_region(self, index: int, offset: int = 0, size: int | None = None) -> mmap.mmap:
        """A region as memory, or whole pages of it. A process that touches it while the function decodes
        no memory dies of SIGBUS; a guest does not.

        Raises VfioError where the kernel does not allow it.
        """
        region = self.regions.get(index)
        if region is None or not region.flags & structs.REGION_MMAP:
            raise VfioError(f"{self.name}: region {index} cannot be mapped")
        size = region.size - offset if size is None else size
        try:
            return self._kernel.mmap(self._open_fd(), size, region.offset + offset)
        except OSError as error:
            raise failed(f"{self.name}: region {index} cannot be mapped", error) from error

    # -- interrupts ----------------------------------------------------------------------------------

    def connect(self, index: int, eventfds: Sequence[int]) -> None:
        """Interrupt ``n`` of the kind ``index`` signals ``eventfds[n]``, and the kind is switched on."""
        data = b"".join(fd.to_bytes(4, "little", signed=True) for fd in eventfds)
        flags = structs.IRQ_DATA_EVENTFD | structs.IRQ_TRIGGER
        got = self._set_irqs(index, flags, len(eventfds), data)
        if got > 0:
            raise VfioError(f"{self.name}: the host has {got} interrupts left, {len(eventfds)} are needed")

    def disconnect(self, index: int) -> None:
        """Switch a kind of interrupt off."""
        self._set_irqs(index, structs.IRQ_DATA_NONE | structs.IRQ_TRIGGER, 0)

    def unmask_intx(self) -> None:
        """INTx was handled: VFIO masks it whenever it comes."""
        self._set_irqs(structs.INTX, structs.IRQ_DATA_NONE | structs.IRQ_UNMASK, 1)

    def resample_intx(self, eventfd: int) -> None:
        """Whenever ``eventfd`` is signalled the kernel unmasks INTx by itself."""
        data = eventfd.to_bytes(4, "little", signed=True)
        self._set_irqs(structs.INTX, structs.IRQ_DATA_EVENTFD | structs.IRQ_UNMASK, 1, data)

    def _set_irqs(self, index: int, flags: int, count: int, data: bytes = b"") -> int:
        size = ctypes.sizeof(structs.IrqSet) + len(data)
        body = bytearray(structs.IrqSet(size, flags, index, 0, count)) + data
        return self._ioctl(f"refuses its interrupts (kind {index})", structs.DEVICE_SET_IRQS, body)

    # -- resets ----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """The first reset the kernel knows for it; it gives back the command register of before."""
        self._ioctl("cannot be reset", structs.DEVICE_RESET)

    def hot_reset_affects(self) -> list[structs.DependentDevice]:
        """The functions that a reset of its bus resets, itself included."""
        head = ctypes.sizeof(structs.HotReset)
        each = ctypes.sizeof(structs.DependentDevice)
        body = bytearray(structs.HotReset(head + _MOST_DEPENDENT * each)) + bytes(_MOST_DEPENDENT * each)
        self._ioctl("has no bus reset", structs.DEVICE_GET_PCI_HOT_RESET_INFO, body)
        count = min(structs.HotReset.from_buffer_copy(body).count, _MOST_DEPENDENT)
        return [structs.DependentDevice.from_buffer_copy(body, head + n * each) for n in range(count)]

    def hot_reset(self, group_fds: Sequence[int]) -> None:
        """Reset the bus; ``group_fds`` prove that all its functions are ours."""
        data = b"".join(fd.to_bytes(4, "little", signed=True) for fd in group_fds)
        body = structs.HotReset(ctypes.sizeof(structs.HotReset) + len(data), 0, len(group_fds))
        self._ioctl("refuses a reset of its bus", structs.DEVICE_PCI_HOT_RESET, bytearray(body) + data)

    # -- life ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give it back; the kernel clears bus mastering and resets it if it can. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self._kernel.close(fd)

    def _open_fd(self) -> int:
        if self.fd < 0:
            raise OSError(errno.EBADF, "the device was given back")
        return self.fd

    def _inside(self, index: int, offset: int, size: int) -> Region:
        region = self.regions.get(index)
        if region is None or size not in _SIZES or not 0 <= offset <= region.size - size:
            raise VfioError(f"{self.name}: no {size} bytes at {offset:#x} of region {index}")
        return region

    def _ioctl(self, what: str, request: int, argument: int | bytearray | ctypes.Structure = 0) -> int:
        try:
            return self._kernel.ioctl(self._open_fd(), request, argument)
        except OSError as error:
            raise failed(f"{self.name} {what}", error) from error

    def _region(self, index: int) -> Region | None:
        info = structs.RegionInfo(ctypes.sizeof(structs.RegionInfo), index=index)
        try:
            self._kernel.ioctl(self._open_fd(), structs.DEVICE_GET_REGION_INFO, info)
        except OSError:
            return None  # the function has no such region
        return Region(info.flags, info.size, info.offset)

    def _irq_count(self, index: int) -> int:
        info = structs.IrqInfo(ctypes.sizeof(structs.IrqInfo), index=index)
        try:
            self._kernel.ioctl(self._open_fd(), structs.DEVICE_GET_IRQ_INFO, info)
        except OSError:
            return 0
        return int(info.count)
