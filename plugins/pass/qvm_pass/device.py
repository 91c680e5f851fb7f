"""``pass``: the guest drives a physical PCI function. Accesses of its BARs are passed on one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from qvm_quiesce import pci
from qvm_quiesce import state as quiesce_state
from qvm_quiesce.hardware import HardwareError
from qvm_vfio.errors import VfioError
from qvm_vfio.hardware import Ram, VfioHardware, open_device
from qvm_vfio.kernel import Kernel

from qvm_pass.interrupts import Interrupts
from qvm_pass.msi import MOST, Messages, capability
from qvm_pass.options import PassOptions
from qvm_pass.view import View, view_of
from qvmcore.api import GuestEnd, HostError, PciFunction, PciId, PciVdev, Trigger, VdevContext, Window


class Pass(PciVdev):
    """One function of the host. Runs under the slot's lock: accesses, interrupts and resets never meet.

    Its command register decodes memory from the start to the end, whatever the guest's says: the guest's
    decoding decides where the bus has the BARs. Bus mastering follows the guest's.
    """

    vdev_type = "pass"
    summary = "a physical PCI device of the host, by VFIO"
    Options = PassOptions
    options: PassOptions
    physical = True
    irqs = 1
    trigger = Trigger.LEVEL
    msix = False
    # What it is comes from the device.
    pci_id = PciId(0xFFFF, 0xFFFF)
    pci_class = 0xFF0000
    #: The way to the host; tests put another one here.
    kernel: ClassVar[Kernel] = Kernel()

    def __init__(self, ctx: VdevContext, options: PassOptions) -> None:
        super().__init__(ctx, options)
        self._hardware: VfioHardware | None = None
        self._view: View | None = None
        self._function: PciFunction | None = None
        self._interrupts: Interrupts | None = None
        #: Bytes that may be mapped into the guest, as far as we know.
        self._direct = 0
        self._reads = self._writes = self._failures = self._resets = 0

    @classmethod
    def claims(cls, options: PassOptions) -> tuple[str, ...]:
        """A device is one guest's, once."""
        return (f"the device {options.name}",)

    def on_configured(self) -> None:
        """Take the device. Raises HostError with what to do."""
        name = self.options.name
        entry = quiesce_state.quarantined().get(name)
        if entry is not None:
            raise HostError(
                f"{name} is quarantined: {entry['reason']}",
                hint=f"qvm quiesce run {name}, or qvm quiesce release {name} when you know better",
            )
        try:
            hardware = self._hardware = open_device(name, self.kernel)
            messages = hardware.most_messages(min(self.options.vectors, MOST))
            msi = capability(messages, self._msi, self._msi_pending) if messages else None
            self._view = view = view_of(
                hardware, self.options.vectors, self.on_reset, msi, direct=self.options.direct
            )
        except VfioError as error:
            raise HostError(f"{self.ctx.name}: {error.text}", hint=error.hint) from error
        # Known before the start: a guard process gets it, and maps it as we do.
        hardware.give_memory(
            [
                Ram(each.start, each.size, each.fd, each.host_address, partial(getattr, each, "view"))
                for each in self.ctx.memory.regions
                if not each.rom
            ]
        )
        self.pci_id, self.pci_class = view.identity, view.class_code
        self.capabilities, self.vectors, self.intx = view.capabilities, view.vectors, view.intx
        self.ctx.log.info(
            "%s: %s is %04x:%04x; the guest does not see: %s",
            self.ctx.name, name, view.identity.vendor, view.identity.device, ", ".join(view.hidden) or "-",
        )  # fmt: skip

    def bars(self) -> Sequence[Window]:
        """The memory BARs of the device, with its numbers."""
        return self._view.bars if self._view is not None else ()

    def hardware(self) -> Sequence[VfioHardware]:
        """For whoever quiesces it."""
        return (self._hardware,) if self._hardware is not None else ()

    def on_function(self, function: PciFunction) -> None:
        """Follow the guest's bus mastering and the kind of interrupts it wants."""
        assert self._hardware is not None
        assert self._view is not None
        self._function = function
        function.on_bus_master = self._bus_master
        self._direct = sum(part.size for bar in self._view.bars for part in bar.direct)
        self._interrupts = Interrupts(self.ctx, self._hardware, function, self._failed, self._mapped)

    def on_starting(self) -> None:
        """The guest's memory for its DMA, its registers decoded, INTx. Raises HostError."""
        assert self._hardware is not None
        assert self._interrupts is not None
        try:
            self._hardware.map_dma()
            self._command(pci.COMMAND_MEMORY, 0)
            self._interrupts.start()
        except VfioError as error:
            raise HostError(f"{self.ctx.name}: {error.text}", hint=error.hint) from error

    # -- registers -------------------------------------------------------------------------------------

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """A register; all ones when the device does not answer, as on a bus."""
        value = (1 << 8 * size) - 1
        hardware = self._hardware
        if hardware is not None and not hardware.revoked:
            self._reads += 1
            try:
                value = hardware.bar_read(self._bar(window), offset, size)
            except HardwareError as error:
                self._failed(error)
            self._accessed(window, offset)
        return value

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """A register; lost when the device does not answer."""
        hardware = self._hardware
        if hardware is not None and not hardware.revoked:
            self._writes += 1
            try:
                hardware.bar_write(self._bar(window), offset, size, value)
            except HardwareError as error:
                self._failed(error)
            self._accessed(window, offset)

    def _accessed(self, window: int, offset: int) -> None:
        if self._direct:
            assert self._view is not None
            parts = self._view.bars[window].direct
            if any(part.offset <= offset < part.offset + part.size for part in parts):
                self._direct = 0  # the engine does not map them, or this would not have come here
        if self._interrupts is not None:
            self._interrupts.look()

    def _mapped(self) -> bool:
        return self._direct > 0

    def _bar(self, window: int) -> int:
        assert self._view is not None
        number = self._view.bars[window].number
        assert number is not None
        return number

    def _failed(self, error: HardwareError) -> None:
        """Counted, and said ever more rarely: the guest may do it as often as it likes."""
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:
            self.ctx.log.warning("%s: access %d that failed: %s", self.ctx.name, self._failures, error)

    def _bus_master(self, on: bool) -> None:
        """The guest's Command register (a vCPU's thread)."""
        try:
            self._command(pci.COMMAND_BUS_MASTER * on, pci.COMMAND_BUS_MASTER * (not on))
        except HardwareError as error:
            self._failed(error)

    def _command(self, on: int, off: int) -> None:
        """Set and clear bits of the device's command register; none comes on once it is revoked."""
        hardware = self._hardware
        if hardware is None or (on and hardware.revoked):
            return
        now = hardware.config_read(pci.COMMAND, 2)
        hardware.config_write(pci.COMMAND, 2, now & ~off | on)

    # -- interrupts ------------------------------------------------------------------------------------

    def _msi(self, messages: Messages) -> None:
        if self._interrupts is not None:
            self._interrupts.msi(messages)

    def _msi_pending(self) -> int:
        return self._interrupts.pending if self._interrupts is not None else 0

    # -- life --------------------------------------------------------------------------------------------

    def on_reset(self) -> None:
        """The guest's function level reset: bus mastering, MSI and MSI-X go off, then the device is reset."""
        hardware, function = self._hardware, self._function
        if hardware is None or hardware.revoked:
            return
        if function is not None:
            function.config_write(pci.COMMAND, 2, 0)
            found = pci.capabilities(function.config_read)
            for kind, register in ((pci.CAP_MSIX, pci.MSIX_CONTROL), (pci.CAP_MSI, pci.MSI_CONTROL)):
                if kind in found:
                    function.config_write(found[kind] + register, 2, 0)
        methods = hardware.resets
        if not methods:
            return
        try:
            self._bus_master(False)
            hardware.reset(methods[0])
            self._resets += 1
            self._command(pci.COMMAND_MEMORY, pci.COMMAND_BUS_MASTER)
        except HardwareError as error:
            self._failed(error)

    def on_terminate(self, end: GuestEnd) -> None:
        """Give it back to the kernel, which clears bus mastering and resets it once more."""
        if self._interrupts is not None:
            self._interrupts.silence()
        if self._hardware is not None:
            self._hardware.close()

    def status(self) -> Mapping[str, object]:
        """Which device, and counters."""
        hardware, view = self._hardware, self._view
        if hardware is None or view is None or self._interrupts is None:
            return {"device": self.options.name}
        return {
            "device": self.options.name,
            "id": f"{view.identity.vendor:04x}:{view.identity.device:04x}",
            "class": f"{view.class_code:06x}",
            "vectors": view.vectors,
            "direct": self._direct,
            "hidden": view.hidden,
            "reads": self._reads,
            "writes": self._writes,
            "failures": self._failures,
            "interrupts": hardware.interrupts(),
            **self._interrupts.status(),
            "resets": self._resets,
        }
