"""One VM of KVM: its descriptor, its memory, interrupt inputs and doorbells. No policy.

Every method may be called from any thread. Errors of the kernel come out as OSError, except where a
sentence for people is due.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from qvm_kvm import ioctls
from qvm_kvm.ioctls import ioctl, ioctl_struct
from qvm_kvm.structs import DirtyLog, IoEventFd, IrqFd, IrqLevel, MemorySlot, Msi, Route, RoutingHeader
from qvm_kvm.system import KvmSystem
from qvmcore.api import EngineError, GuestMemory, MemoryRegion

PAGE = mmap.PAGESIZE


class Vm:
    """A VM. ``run_size`` is what each of its vCPUs shares with us, in bytes."""

    def __init__(self, system: KvmSystem) -> None:
        self.run_size = system.run_size
        self.fd = system.create_vm()
        self._slots: dict[int, int] = {}
        self._direct_slots: set[int] = set()
        self._regions: list[MemoryRegion] = []
        self._logging = False

    def close(self) -> None:
        """Close the descriptor; the kernel frees the VM with its last vCPU. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # ---- memory --------------------------------------------------------------------------------

    def add_memory(self, memory: GuestMemory) -> None:
        """Give the guest every region; ROM refuses its writes. Raises EngineError."""
        for region in memory.regions:
            if (region.start | region.size) % PAGE:
                raise EngineError(
                    f"memory at {region.start:#x}, {region.size:#x} bytes: KVM maps pages of {PAGE} bytes",
                    hint="make start and size multiples of the page",
                )
            slot = len(self._regions)
            self._regions.append(region)
            self._slots[region.start] = slot
            try:
                self._map(slot, region)
            except OSError as error:
                raise EngineError(
                    f"KVM refuses memory at {region.start:#x}, {region.size:#x} bytes: {error.strerror}"
                ) from error

    def _map(self, slot: int, region: MemoryRegion) -> None:
        flags = ioctls.MEM_READONLY if region.rom else 0
        if self._logging and not region.rom:
            flags |= ioctls.MEM_LOG_DIRTY_PAGES
        wanted = MemorySlot(slot, flags, region.start, region.size, region.host_address)
        ioctl_struct(self.fd, ioctls.SET_USER_MEMORY_REGION, wanted)

    def add_direct(self, address: int, size: int, host_address: int) -> int:
        """Map memory of this process that is no RAM, such as a physical BAR; its slot. Whole pages.

        Not thread-safe; raises OSError.
        """
        slot = len(self._regions)
        while slot in self._direct_slots:
            slot += 1
        wanted = MemorySlot(slot, 0, address, size, host_address)
        ioctl_struct(self.fd, ioctls.SET_USER_MEMORY_REGION, wanted)
        self._direct_slots.add(slot)
        return slot

    def remove_direct(self, slot: int) -> None:
        """Take it out of the guest again. Raises OSError."""
        ioctl_struct(self.fd, ioctls.SET_USER_MEMORY_REGION, MemorySlot(slot, 0, 0, 0, 0))
        self._direct_slots.discard(slot)

    def log_dirty_pages(self, on: bool) -> None:
        """Start or stop recording which pages the guest writes. Raises EngineError."""
        self._logging = on
        try:
            for slot, region in enumerate(self._regions):
                if not region.rom:
                    self._map(slot, region)
        except OSError as error:
            raise EngineError(f"KVM cannot record written pages: {error.strerror}") from error

    def dirty_pages(self, region: MemoryRegion) -> list[int]:
        """Addresses of the pages the guest wrote since the last call, ascending. Raises EngineError.

        What devices of this process write is not in it: KVM does not see that.
        """
        slot = self._slots.get(region.start)
        if slot is None or self._regions[slot] is not region or region.rom:
            raise EngineError(f"{region.start:#x} is not the start of a writable region of this VM")
        if not self._logging:
            raise EngineError("written pages are not being recorded", hint="call log_dirty_pages(True) first")
        words = (region.size // PAGE + 63) // 64
        bitmap = (ctypes.c_uint64 * words)()
        try:
            ioctl_struct(self.fd, ioctls.GET_DIRTY_LOG, DirtyLog(slot, 0, ctypes.addressof(bitmap)))
        except OSError as error:
            raise EngineError(f"KVM does not tell the written pages: {error.strerror}") from error
        found = []
        for index, word in enumerate(bitmap):
            while word:
                lowest = word & -word
                found.append(region.start + PAGE * (64 * index + lowest.bit_length() - 1))
                word ^= lowest
        return found

    # ---- interrupts ----------------------------------------------------------------------------

    def set_line(self, level: IrqLevel) -> None:
        """Drive a GSI."""
        ioctl_struct(self.fd, ioctls.IRQ_LINE, level)

    def signal_msi(self, address: int, data: int) -> None:
        """Deliver one message now."""
        message = Msi(address & 0xFFFFFFFF, address >> 32, data)
        ioctl_struct(self.fd, ioctls.SIGNAL_MSI, message)

    def attach_irqfd(self, fd: int, gsi: int, resample: int = -1) -> None:
        """From now on each write to the eventfd raises the GSI once.

        With ``resample`` it stays high until the guest has served it; that eventfd is signalled then.
        """
        wanted = IrqFd(fd, gsi) if resample < 0 else IrqFd(fd, gsi, ioctls.IRQFD_RESAMPLE, resample)
        ioctl_struct(self.fd, ioctls.IRQFD, wanted)

    def detach_irqfd(self, fd: int, gsi: int) -> None:
        """No longer; interrupts that are under way have arrived when this returns."""
        ioctl_struct(self.fd, ioctls.IRQFD, IrqFd(fd, gsi, ioctls.IRQFD_DEASSIGN))

    def set_routes(self, routes: list[Route]) -> None:
        """Replace the whole table of GSIs."""
        header = RoutingHeader(len(routes), 0)
        table = ctypes.create_string_buffer(bytes(header) + b"".join(bytes(route) for route in routes))
        ioctl_struct(self.fd, ioctls.SET_GSI_ROUTING, table)

    # ---- doorbells -----------------------------------------------------------------------------

    def attach_ioeventfd(self, wanted: IoEventFd) -> None:
        """Signal an eventfd on a guest write, or no longer (IOEVENTFD_DEASSIGN)."""
        ioctl_struct(self.fd, ioctls.IOEVENTFD, wanted)

    # ---- vCPUs ---------------------------------------------------------------------------------

    def create_vcpu(self, index: int) -> int:
        """The descriptor of a new vCPU."""
        return ioctl(self.fd, ioctls.CREATE_VCPU, index)
