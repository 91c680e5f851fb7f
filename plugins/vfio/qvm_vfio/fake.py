"""VFIO without a kernel that has it: for tests of what uses this package. No driver and no root needed.

Descriptors are memfds whose names say what they are, so any process that gets one (a guard, by
SCM_RIGHTS) finds the same device: its configuration space and its BARs are the file's content.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvm_quiesce import pci

from qvm_vfio import structs
from qvm_vfio.fake_function import EXPRESS_AT, MSIX_AT, FakeFunction, FakeIrqs
from qvm_vfio.hardware import VfioHardware
from qvm_vfio.hardware import adopt as adopt_with
from qvm_vfio.kernel import Argument, Kernel

#: Region ``n`` starts at ``n << REGION_SHIFT`` of the descriptor.
REGION_SHIFT = 32


class FakeKernel(Kernel):
    """A host below ``root`` with the given functions. Without ``root``: another process's view of one.

    ``calls`` are the ioctls so far, by the kernel's names; ``errors`` maps a name of these, or that of a
    file below /dev/vfio, to the errno it shall fail with.
    """

    adopt = "qvm_vfio.fake:adopt"

    def __init__(self, root: Path | None = None, functions: Sequence[FakeFunction] = ()) -> None:
        self.functions = {each.name: each for each in functions}
        self.calls: list[str] = []
        self.errors: dict[str, int] = {}
        #: Sizes and addresses by I/O virtual address.
        self.mappings: dict[int, tuple[int, int]] = {}
        self.irqs = {each.name: FakeIrqs() for each in functions}
        self.open_fds: set[int] = set()
        self._devices: dict[str, int] = {}
        self._root = root
        if root is not None:
            self.sys, self.dev, self.proc = root / "sys", root / "dev/vfio", root / "proc"
            self._make_tree()

    # -- what a test does ------------------------------------------------------------------------------

    def set_driver(self, name: str, driver: str) -> None:
        """Bind a function without asking sysfs; empty for none."""
        link = self.sys / "bus/pci/devices" / name / "driver"
        link.unlink(missing_ok=True)
        if driver:
            (self.sys / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
            link.symlink_to(self.sys / "bus/pci/drivers" / driver)

    def device_fd(self, name: str) -> int:
        """The file of a function; the hardware itself, whoever else has it open."""
        return self._devices[name]

    def config(self, name: str, offset: int, size: int) -> int:
        """Configuration space as it is."""
        data = os.pread(self._devices[name], size, (structs.CONFIG_REGION << REGION_SHIFT) + offset)
        return int.from_bytes(data, "little")

    def poke(self, name: str, region: int, offset: int, data: bytes) -> None:
        """The device itself changes a register."""
        os.pwrite(self._devices[name], data, (region << REGION_SHIFT) + offset)

    @property
    def kind(self) -> int | None:
        """Which kind of interrupt of the first function is connected."""
        return next(iter(self.irqs.values())).kind

    @property
    def eventfds(self) -> list[int]:
        """The eventfds of that kind."""
        return next(iter(self.irqs.values())).eventfds

    def fire(self, kind: int, vector: int = 0, name: str = "") -> bool:
        """The device, by default the first, interrupts; whether anybody is told."""
        irqs = self.irqs[name or next(iter(self.irqs))]
        if irqs.resample >= 0 and _take(irqs.resample):
            irqs.masked = False
        if irqs.kind != kind or vector >= len(irqs.eventfds) or (kind == structs.INTX and irqs.masked):
            return False
        irqs.masked = kind == structs.INTX
        os.eventfd_write(irqs.eventfds[vector], 1)
        return True

    def dma(self, name: str, iova: int, data: bytes) -> bool:
        """The device writes to memory; False when bus mastering is off or nothing is mapped there."""
        if not self.config(name, pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER:
            return False
        for start, (size, address) in self.mappings.items():
            if start <= iova and iova + len(data) <= start + size:
                ctypes.memmove(address + iova - start, data, len(data))
                return True
        return False

    def close_all(self) -> None:
        """The host is gone."""
        for fd in self._devices.values():
            os.close(fd)
        self._devices.clear()

    # -- Kernel ----------------------------------------------------------------------------------------

    def open(self, path: Path) -> int:
        """A container or a group."""
        self._fail(path.name)
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        what = "container" if path.name == "vfio" else f"group-{path.name}"
        if what != "container" and any(_what(each) == what for each in self.open_fds):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))  # a group is opened once
        fd = os.memfd_create(what, os.MFD_CLOEXEC)
        self.open_fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """Closed; of a device, the kernel clears bus mastering then."""
        self.open_fds.discard(fd)
        os.close(fd)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """BARs answer only while memory is decoded."""
        self._decoded(fd, offset)
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """An FLR by its bit; MSI-X cannot be switched by configuration space."""
        self._decoded(fd, offset)
        at = offset - (structs.CONFIG_REGION << REGION_SHIFT)
        if at == MSIX_AT + pci.MSIX_CONTROL:
            return len(data)
        if at == EXPRESS_AT + pci.EXPRESS_DEVICE_CONTROL and data[1] & 0x80:
            self._reset(fd)
            return len(data)
        return os.pwrite(fd, data, offset)

    def write_sysfs(self, path: Path, text: str) -> None:
        """driver_override, unbind and drivers_probe, as the PCI core does them."""
        self._fail(path.name)
        text = text.strip()
        if path.name == "driver_override":
            path.write_text(text)
        elif path.name == "unbind":
            self.set_driver(text, "")
        elif path.name == "drivers_probe":
            override = self.sys / "bus/pci/devices" / text / "driver_override"
            self.set_driver(text, override.read_text() if override.exists() else "")

    def ioctl(self, fd: int, request: int, argument: Argument = 0) -> int:
        """The calls of <linux/vfio.h>."""
        name = (_ON_DEVICE if _what(fd).startswith("device-") else _ELSEWHERE)[request]
        self.calls.append(name)
        self._fail(name)
        answer: int = getattr(self, f"_{name.lower()}")(fd, argument)
        return answer

    # -- calls, by name --------------------------------------------------------------------------------

    def _get_api_version(self, fd: int, argument: Any) -> int:
        return structs.API_VERSION

    def _check_extension(self, fd: int, argument: Any) -> int:
        return int(argument in (structs.TYPE1_IOMMU, structs.TYPE1V2_IOMMU))

    def _set_iommu(self, fd: int, argument: Any) -> int:
        return 0

    def _iommu_map_dma(self, fd: int, wanted: Any) -> int:
        if wanted.iova in self.mappings:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.mappings[wanted.iova] = (wanted.size, wanted.vaddr)
        return 0

    def _iommu_unmap_dma(self, fd: int, wanted: Any) -> int:
        # In the file as well: another process may have done it.
        os.write(fd, f"unmap {wanted.iova:#x} {wanted.size:#x}\n".encode())
        wanted.size, _ = self.mappings.pop(wanted.iova, (0, 0))
        return 0

    def _group_get_status(self, fd: int, status: Any) -> int:
        number = int(_what(fd).rpartition("-")[2])
        mine = [each for each in self.functions.values() if each.group == number]
        status.flags = structs.GROUP_VIABLE * all(self._driver(each) in ("", "vfio-pci") for each in mine)
        return 0

    def _group_set_container(self, fd: int, argument: Any) -> int:
        assert _what(int.from_bytes(argument, "little")) == "container"
        return 0

    def _group_get_device_fd(self, fd: int, argument: Any) -> int:
        name = bytes(argument).rstrip(b"\0").decode()
        copy = os.dup(self._devices[name])
        self.open_fds.add(copy)
        return copy

    def _device_get_info(self, fd: int, info: Any) -> int:
        function = self._function(fd)
        info.flags = structs.DEVICE_IS_PCI | structs.DEVICE_HAS_RESET * bool(function.resets)
        info.num_regions, info.num_irqs = structs.CONFIG_REGION + 2, structs.MSIX + 3
        return 0

    def _device_get_region_info(self, fd: int, info: Any) -> int:
        bars = self._function(fd).bars
        if info.index == structs.CONFIG_REGION:
            info.size = 4096
        elif info.index in bars:
            info.size = bars[info.index][0]
        info.flags = structs.REGION_READ | structs.REGION_WRITE | structs.REGION_MMAP
        info.offset = info.index << REGION_SHIFT
        return 0

    def _device_get_irq_info(self, fd: int, info: Any) -> int:
        function = self._function(fd)
        counts = {
            structs.INTX: int(function.intx), structs.MSI: function.messages, structs.MSIX: function.vectors
        }  # fmt: skip
        info.count = counts[info.index]
        return 0

    def _device_set_irqs(self, fd: int, body: bytearray) -> int:
        head = structs.IrqSet.from_buffer_copy(body)
        irqs = self.irqs.setdefault(self._function(fd).name, FakeIrqs())
        numbers = memoryview(body)[ctypes.sizeof(structs.IrqSet) :].cast("i")
        if head.flags & structs.IRQ_UNMASK and irqs.kind != structs.INTX:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if head.flags & structs.IRQ_UNMASK and head.flags & structs.IRQ_DATA_EVENTFD:
            irqs.resample = numbers[0]
        elif head.flags & structs.IRQ_UNMASK:
            irqs.masked = False
        elif head.flags & structs.IRQ_DATA_NONE:
            if irqs.kind not in (None, head.index):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            irqs.kind, irqs.eventfds, irqs.resample = None, [], -1
            self._show_msix(fd, False)
        elif irqs.kind is not None and irqs.kind != head.index:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        else:
            irqs.kind, irqs.eventfds = head.index, list(numbers)
            self._show_msix(fd, head.index == structs.MSIX)
        return 0

    def _device_reset(self, fd: int, argument: Any) -> int:
        self._reset(fd)
        return 0

    def _device_get_pci_hot_reset_info(self, fd: int, body: bytearray) -> int:
        mine = self._function(fd)
        bus = [each for each in self.functions.values() if each.name[:7] == mine.name[:7]] or [mine]
        head = structs.HotReset(len(body), 0, len(bus))
        data = b"".join(bytes(structs.DependentDevice(each.group)) for each in bus)
        body[: ctypes.sizeof(head) + len(data)] = bytes(head) + data
        return 0

    def _device_pci_hot_reset(self, fd: int, argument: Any) -> int:
        self._reset(fd)
        return 0

    # -- inside ----------------------------------------------------------------------------------------

    def _fail(self, name: str) -> None:
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]))

    def _function(self, fd: int) -> FakeFunction:
        name = _what(fd).removeprefix("device-")
        return self.functions.get(name) or FakeFunction(name)

    def _driver(self, function: FakeFunction) -> str:
        link = self.sys / "bus/pci/devices" / function.name / "driver"
        return link.readlink().name if link.is_symlink() else ""

    def _show_msix(self, fd: int, on: bool) -> None:
        function = self._function(fd)
        if function.vectors:
            value = function.vectors - 1 | pci.MSIX_ENABLE * on
            at = (structs.CONFIG_REGION << REGION_SHIFT) + MSIX_AT + pci.MSIX_CONTROL
            os.pwrite(fd, value.to_bytes(2, "little"), at)

    def _decoded(self, fd: int, offset: int) -> None:
        """EIO for a BAR while memory is not decoded, as the kernel has it."""
        if offset >> REGION_SHIFT >= structs.ROM_REGION:
            return
        command = os.pread(fd, 1, (structs.CONFIG_REGION << REGION_SHIFT) + pci.COMMAND)[0]
        if not command & pci.COMMAND_MEMORY:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _reset(self, fd: int) -> None:
        """Registers as at power-on; configuration space is given back by the kernel."""
        for number, (size, _) in self._function(fd).bars.items():
            os.pwrite(fd, bytes(min(size, 1 << 16)), number << REGION_SHIFT)

    def _make_tree(self) -> None:
        self.dev.mkdir(parents=True)
        (self.sys / "bus/pci/devices").mkdir(parents=True)
        (self.dev / "vfio").touch()
        for function in self.functions.values():
            place = self.sys / "bus/pci/devices" / function.name
            group = self.sys / "kernel/iommu_groups" / str(function.group)
            place.mkdir()
            (group / "devices").mkdir(parents=True, exist_ok=True)
            (group / "devices" / function.name).symlink_to(place)
            (place / "iommu_group").symlink_to(group)
            (place / "class").write_text(f"{function.class_code:#08x}\n")
            if function.resets:
                (place / "reset_method").write_text(f"{function.resets}\n")
            self.set_driver(function.name, function.driver)
            (self.dev / str(function.group)).touch()
            fd = self._devices[function.name] = os.memfd_create(f"device-{function.name}", os.MFD_CLOEXEC)
            os.ftruncate(fd, structs.CONFIG_REGION + 1 << REGION_SHIFT)
            os.pwrite(fd, function.config(), structs.CONFIG_REGION << REGION_SHIFT)

    def mmap(self, fd: int, size: int, offset: int) -> mmap.mmap:
        """The same bytes that pread gives."""
        return mmap.mmap(fd, size, offset=offset)


def _what(fd: int) -> str:
    """What a descriptor is: ``container``, ``group-7``, ``device-0000:03:00.0``."""
    return str(Path(f"/proc/self/fd/{fd}").readlink()).removeprefix("/memfd:").removesuffix(" (deleted)")


def _take(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def adopt(values: dict[str, Any], fds: Sequence[int]) -> VfioHardware:
    """A device of another process's FakeKernel."""
    return adopt_with(values, fds, FakeKernel())


def _numbers(names: Sequence[str]) -> dict[int, str]:
    return {getattr(structs, name): name for name in names}


#: The calls by number, which mean one thing on a device and another on a container or group.
_ON_DEVICE = _numbers([name for name in dir(structs) if name.startswith("DEVICE_") and "_IS_" not in name])
_ELSEWHERE = _numbers(
    (
        "GET_API_VERSION", "CHECK_EXTENSION", "SET_IOMMU", "IOMMU_MAP_DMA", "IOMMU_UNMAP_DMA",
        "GROUP_GET_STATUS", "GROUP_SET_CONTAINER", "GROUP_GET_DEVICE_FD",
    )
)  # fmt: skip

__all__ = ["FakeFunction", "FakeKernel", "adopt"]
