"""A physical PCI function as quiescing and the vdev ``pass`` need it: ``qvm_quiesce.hardware.Hardware``.

Resets. The kernel has one call, VFIO_DEVICE_RESET, and does with it the first method that
``/sys/bus/pci/devices/NAME/reset_method`` lists (so does a write of the FLR bit, which VFIO catches).
Hence that method is done by this call; ``pm`` also by D3hot and back, ``bus`` also by a hot reset, which
the kernel allows when every function on the bus is in our group. Any of them brings the command register
of before back: bus mastering has to be off before.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from qvm_quiesce import pci
from qvm_quiesce.hardware import Handover

from qvm_vfio import direct, structs, sysfs
from qvm_vfio.device import VfioDevice
from qvm_vfio.errors import VfioError, failed
from qvm_vfio.iommu import Container, Group
from qvm_vfio.irqs import Irqs
from qvm_vfio.kernel import Kernel
from qvm_vfio.space import Member, join

#: The gentlest reset first.
_STRENGTH = ("flr", "af-flr", "pm", "bus")
_D3_WAIT = 0.01
_BARS = 6
_EXTENDED_CONFIG = 4096


class Ram(NamedTuple):
    """Memory a device may reach: ``size`` bytes, at ``iova`` for it and ``address`` for this process.

    ``fd`` is the memfd behind it, the range starting at its first byte. ``view()`` is the memory, for the
    thread that asks: without a GIL each thread that slices it needs a view of its own.
    """

    iova: int
    size: int
    fd: int
    address: int
    view: Callable[[], memoryview]


class VfioHardware:
    """Implements Hardware. Any thread; raises VfioError, which is a HardwareError."""

    platform = False

    def __init__(self, kernel: Kernel, space: Member, device: VfioDevice, resets: Sequence[str]) -> None:
        self.device = device
        #: Set by :meth:`revoke`: nothing of a guest may reach the device any more.
        self.revoked = False
        #: Told by :meth:`revoke`, any thread: no interrupt may reach the guest once it returns.
        self.on_revoke: Callable[[], None] = lambda: None
        self._kernel = kernel
        self._space = space
        self._irqs = Irqs(device)
        #: As the kernel tries them; the first is what VFIO_DEVICE_RESET does.
        self._kernel_resets = tuple(resets)
        self._memory: list[Ram] = []
        self._own_maps: list[mmap.mmap] = []
        self._own_fds: list[int] = []
        #: Addresses and sizes of the pages :meth:`direct` has mapped.
        self._direct: list[tuple[int, int]] = []
        self._capabilities = pci.capabilities(device.config_read)

    # -- Hardware --------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its place on the host."""
        return self.device.name

    def config_read(self, offset: int, size: int) -> int:
        """Configuration space as VFIO shows it; all ones behind the 256 bytes of conventional PCI."""
        end = self.device.regions[structs.CONFIG_REGION].size
        if end <= offset <= _EXTENDED_CONFIG - size:
            return (1 << 8 * size) - 1
        return self.device.config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write to it. VFIO drops writes that switch MSI-X off, so these become what it understands."""
        for number, register, enable, kind in (
            (pci.CAP_MSIX, pci.MSIX_CONTROL, pci.MSIX_ENABLE, structs.MSIX),
            (pci.CAP_MSI, pci.MSI_CONTROL, pci.MSI_ENABLE, structs.MSI),
        ):
            at = self._capabilities.get(number)
            if at is not None and offset == at + register and size == 2 and not value & enable:
                self._irqs.disconnect(kind)
        self.device.config_write(offset, size, value)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """A register of a BAR."""
        return self.device.read(self._bar(bar), offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register of a BAR."""
        self.device.write(self._bar(bar), offset, size, value)

    @property
    def resets(self) -> Sequence[str]:
        """What can be done: the kernel's first method, and D3hot and a hot reset where they work."""
        offered = set(self._kernel_resets[:1] if self.device.has_reset else ())
        offered |= {"pm"} & set(self._kernel_resets)
        if self._bus_is_ours():
            offered.add("bus")
        return [method for method in _STRENGTH if method in offered]

    def reset(self, method: str) -> None:
        """See the module's text. Bus mastering is what it was before."""
        if self.device.has_reset and self._kernel_resets[:1] == (method,):
            self.device.reset()
        elif method == "pm" and pci.CAP_PM in self._capabilities:
            self._through_d3()
        elif method == "bus" and self._bus_is_ours():
            self.device.hot_reset([self._space.group.fd])
        else:
            first = ", ".join(self._kernel_resets) or "no method at all"
            raise VfioError(f"{self.name} cannot be reset by {method}: the kernel offers {first}")

    def revoke(self) -> None:
        """Whoever passes accesses of a guest on looks at :attr:`revoked`; what is mapped is covered."""
        self.revoked = self._irqs.revoked = True
        try:
            self.on_revoke()
        finally:
            for address, size in self._direct:
                try:
                    self._kernel.cover(address, size)
                except OSError as error:
                    raise failed(f"{self.name}: its registers stay mapped", error) from error

    def drop_interrupts(self) -> None:
        """Disconnect INTx, MSI and MSI-X."""
        self._irqs.drop()

    def interrupts(self) -> int:
        """All that came to our eventfds and that nobody else took; none comes once they are disconnected."""
        return self._irqs.count()

    def memory(self) -> Sequence[memoryview]:
        """What :meth:`give_memory` was given; the views are for the calling thread."""
        return [each.view() for each in self._memory]

    def unmap_dma(self) -> None:
        """Take the memory out of the IOMMU; or leave it there for a function of its group that has it."""
        self._space.unmap()

    def handover(self) -> Handover:
        """Container, group, device, and the memory's memfds."""
        values: dict[str, Any] = {
            "name": self.name,
            "group": self._space.group.number,
            "resets": list(self._kernel_resets),
            "memory": [[each.iova, each.size] for each in self._memory],
        }
        device = () if self.device.fd < 0 else (self.device.fd,)
        values["opened"] = bool(device)
        fds = (self._space.container.fd, self._space.group.fd, *device, *(each.fd for each in self._memory))
        if min(fds) < 0:
            raise VfioError(f"{self.name} was given back; nobody can take it over")
        return Handover(self._kernel.adopt, str(Path(__file__).parents[1]), values, fds)

    def surrender(self) -> None:
        """Close the device; container and group stay, and with them the memory in the IOMMU."""
        self.device.close()

    def close(self) -> None:
        """Close everything: device first, so that its memory goes last."""
        self.device.close()
        self._space.leave()
        self._irqs.close()
        self._memory.clear()
        while self._own_fds:
            self._kernel.close(self._own_fds.pop())
        while self._own_maps:
            try:
                self._own_maps.pop().close()
            except BufferError:
                pass  # somebody still looks at it; the pages go with the process

    # -- for the owner ---------------------------------------------------------------------------------

    def give_memory(self, memory: Sequence[Ram], *, mapped: bool = False) -> None:
        """What the device shall reach; before :meth:`handover`. ``mapped``: it does so already."""
        self._memory = list(memory)
        if mapped:
            self._space.adopt((each.iova, each.size, each.address) for each in memory)

    def map_dma(self) -> None:
        """Put the memory into the IOMMU. All of it or, with a VfioError, none."""
        self._space.map((each.iova, each.size, each.address) for each in self._memory)

    def direct(self, bar: int) -> list[tuple[int, int, int]]:
        """Map the whole pages of a BAR that hold neither vector table nor pending bits of MSI-X.

        (offset, size, address in this process) of each run of pages; none where the kernel maps nothing.
        """
        self._bar(bar)
        found = []
        for offset, size in direct.runs(self.device, bar, self._capabilities.get(pci.CAP_MSIX)):
            try:
                memory = self.device.map_region(bar, offset, size)
            except VfioError:
                continue  # this part is reached by pread and pwrite
            self.keep_map(memory)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            self._direct.append((address, size))
            found.append((offset, size, address))
        return found

    def connect(self, kind: int, count: int) -> tuple[int, ...]:
        """Switch interrupts on: INTX, MSI or MSIX of structs; eventfds in their order."""
        return self._irqs.connect(kind, count)

    def most_messages(self, most: int) -> int:
        """How many interrupts of MSI the host has for it now, by trying: a power of two; 0 without MSI.

        Before the guest starts: it leaves all off. The kernel needs them in one piece.
        """
        count = 1 << min(self.device.irqs.get(structs.MSI, 0), most).bit_length() >> 1
        while count > 1:
            try:
                self._irqs.connect(structs.MSI, count)
                break
            except VfioError:
                count >>= 1
        self._irqs.disconnect(structs.MSI)
        return count

    def resample(self) -> int:
        """While INTx is connected: an eventfd whose signals unmask it."""
        return self._irqs.resample()

    def disconnect(self, kind: int) -> None:
        """Switch a kind off."""
        self._irqs.disconnect(kind)

    def take(self, eventfd: int) -> int:
        """How often it was signalled since."""
        return self._irqs.take(eventfd)

    def keep_map(self, memory: mmap.mmap, fd: int = -1) -> None:
        """Close a mapping, and the descriptor of its memory, with the rest."""
        self._own_maps.append(memory)
        self._own_fds += [fd] if fd >= 0 else []

    # -- inside ----------------------------------------------------------------------------------------

    def _bar(self, bar: int) -> int:
        if not 0 <= bar < _BARS:
            raise VfioError(f"{self.name}: there is no BAR {bar}")
        return bar

    def _bus_is_ours(self) -> bool:
        try:
            affected = self.device.hot_reset_affects()
        except VfioError:
            return False
        return bool(affected) and all(each.group_id == self._space.group.number for each in affected)

    def _through_d3(self) -> None:
        at = self._capabilities[pci.CAP_PM] + pci.PM_CONTROL
        control = self.config_read(at, 2) & ~pci.PM_STATE
        for state in (pci.PM_D3HOT, 0):
            self.config_write(at, 2, control | state)
            time.sleep(_D3_WAIT)


def open_device(name: str, kernel: Kernel | None = None) -> VfioHardware:
    """Take a function (``0000:03:00.0``) that is bound to vfio-pci. Raises VfioError; binds nothing."""
    kernel = kernel or Kernel()
    function = sysfs.PciFunction(kernel, sysfs.address(name))
    number = function.check()

    def opened() -> tuple[Container, Group]:
        with ExitStack() as undo:
            container = Container(kernel)
            undo.callback(container.close)
            group = Group(kernel, function.name, number)
            undo.callback(group.close)
            group.join(container)
            container.set_iommu()
            undo.pop_all()
        return container, group

    space, _ = join(kernel, number, opened)
    try:
        device = _device(kernel, function.name, space.group.device(function.name))
        try:
            return VfioHardware(kernel, space, device, function.resets)
        except BaseException:
            device.close()
            raise
    except BaseException:
        space.leave()
        raise


def adopt(values: dict[str, Any], fds: Sequence[int], kernel: Kernel | None = None) -> VfioHardware:
    """The device of another process, by its descriptors; see :meth:`VfioHardware.handover`."""
    kernel = kernel or Kernel()
    name = values["name"]
    number, (first, second) = values["group"], fds[:2]
    space, new = join(kernel, number, lambda: (Container(kernel, first), Group(kernel, name, number, second)))
    if not new:
        # Another function of the group came with them.
        for fd in (first, second):
            kernel.close(fd)
    try:
        # Of one that was surrendered only the memory is held: it is opened anew.
        fds = [*fds[2:]] if values["opened"] else [space.group.device(name), *fds[2:]]
        hardware = VfioHardware(kernel, space, _device(kernel, name, fds[0]), values["resets"])
        memory = []
        for (iova, size), fd in zip(values["memory"], fds[1:], strict=True):
            try:
                own = mmap.mmap(fd, size)
            except (OSError, ValueError) as error:
                raise VfioError(f"{name}: its memory cannot be mapped: {error}") from error
            hardware.keep_map(own, fd)
            memory.append(Ram(iova, size, fd, 0, _view_of(own)))
    except BaseException:
        space.leave()
        raise
    hardware.give_memory(memory, mapped=True)
    return hardware


def _view_of(own: mmap.mmap) -> Callable[[], memoryview]:
    """Nobody else has this mapping, and one thread at a time is at work on a device."""
    return lambda: memoryview(own)


def _device(kernel: Kernel, name: str, fd: int) -> VfioDevice:
    try:
        return VfioDevice(kernel, name, fd)
    except BaseException:
        try:
            kernel.close(fd)
        except OSError as error:
            raise failed(f"{name} cannot be opened", error) from error
        raise
