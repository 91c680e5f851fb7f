"""``pass-uio``: a range of registers of a platform device, and its interrupt, for the guest; by UIO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from qvm_quiesce import state as quiesce_state
from qvm_quiesce.hardware import HardwareError
from qvm_vfio.errors import VfioError
from qvm_vfio.uio import UioHardware, UioKernel, open_uio

from qvmcore.api import DirectPart, FdtNode, GuestEnd, HostError, MmioHandler, Trigger, Vdev, Window

#: The smallest that can be mapped, and more than any device has.
_PAGE, _MOST = 4096, 1 << 30


class UioOptions(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """Which device, and what the guest is told of it."""

    uio: Annotated[
        str, msgspec.Meta(min_length=1, description='the device: "/dev/uio0", "uio0", or its driver\'s name')
    ]
    map: Annotated[int, msgspec.Meta(ge=0, le=4, description="which of its ranges")] = 0
    size: Annotated[int, msgspec.Meta(ge=1, le=_MOST, description="bytes of the range the guest gets")] = (
        _PAGE
    )
    irq: Annotated[
        Literal["level", "edge", "none"],
        msgspec.Meta(description="how its interrupt signals; none: intr is not needed"),
    ] = "level"
    direct: Annotated[
        bool,
        msgspec.Meta(description="map the registers into the guest, unless the interrupt has a level"),
    ] = True
    compatible: Annotated[
        tuple[str, ...], msgspec.Meta(description="what the guest's device tree says that it is")
    ] = ()
    acpi_hid: Annotated[str, msgspec.Meta(description="the same for a board with ACPI")] = ""


class PassUio(Vdev):
    """One range of one device. Runs under the slot's lock: accesses and interrupts never meet.

    A level interrupt stays masked in the host until the guest's next access of the registers, which may
    have been the one that quietens the device; if not, it comes again. So its registers are not mapped.
    """

    vdev_type = "pass-uio"
    summary = "registers and interrupt of a platform device of the host, by UIO"
    Options = UioOptions
    options: UioOptions
    physical = True
    #: The way to the host; tests put another one here.
    kernel: ClassVar[UioKernel] = UioKernel()

    def __init__(self, ctx: Any, options: UioOptions) -> None:
        super().__init__(ctx, options)
        self._hardware: UioHardware | None = None
        self._address = 0
        self._high = False
        self._reads = self._writes = self._failures = self._interrupts = 0

    @classmethod
    def for_options(cls, options: UioOptions) -> type[Vdev]:
        """With the window and the interrupt that the options say."""
        declared = {
            "windows": (Window(options.size),),
            "irqs": int(options.irq != "none"),
            "trigger": Trigger.EDGE if options.irq == "edge" else Trigger.LEVEL,
            "fdt_compatible": options.compatible,
            "acpi_hid": options.acpi_hid,
        }
        return type(cls.__name__, (cls,), declared)

    @classmethod
    def claims(cls, options: UioOptions) -> tuple[str, ...]:
        """A device is one guest's, once; by the name that is written."""
        return (f"the device {options.uio.removeprefix('/dev/')}",)

    def on_configured(self) -> None:
        """Take the device. Raises HostError with what to do."""
        options, name = self.options, self.ctx.name
        try:
            hardware = self._hardware = open_uio(options.uio, self.kernel, interrupt=options.irq != "none")
            self._refuse_quarantined(hardware.name)
            have = hardware.size(options.map)
            if options.size > have:
                raise VfioError(
                    f"map {options.map} of {hardware.name} has {have:#x} bytes, less than {options.size:#x}",
                    f"write size = {have:#x}",
                )
            if options.direct and options.irq != "level":
                self._address = hardware.direct(options.map, options.size)
        except VfioError as error:
            raise HostError(f"{name}: {error.text}", hint=error.hint) from error
        self.ctx.log.info(
            "%s: %s (%s), %#x bytes, %s", name, hardware.name, hardware.label, options.size,
            "mapped into the guest where the engine can" if self._address else "not mapped into the guest",
        )  # fmt: skip

    def _refuse_quarantined(self, device: str) -> None:
        entry = quiesce_state.quarantined().get(device)
        if entry is not None:
            raise HostError(
                f"{device} is quarantined: {entry['reason']}",
                hint=f"qvm quiesce release {device} when you know that it is quiet",
            )

    def handler(self) -> MmioHandler:
        """Its registers for the bus: the mapped ones may go to the guest."""
        part = DirectPart(0, self.options.size, self._address)
        return MmioHandler(
            lambda offset, size: self.mmio_read(0, offset, size),
            lambda offset, size, value: self.mmio_write(0, offset, size, value),
            direct=(part,) if self._address else (),
        )

    def hardware(self) -> Sequence[UioHardware]:
        """For whoever quiesces it."""
        return (self._hardware,) if self._hardware is not None else ()

    def describe_fdt(self, node: FdtNode) -> None:
        """All that is known is in the node already."""

    def on_starting(self) -> None:
        """From here on its interrupt comes. Raises HostError."""
        hardware = self._hardware
        if hardware is None or self.options.irq == "none":
            return
        try:
            self.ctx.worker.watch(hardware.waitable, self._interrupt)
            hardware.enable_interrupt(True)
        except (OSError, VfioError) as error:
            text = error.text if isinstance(error, VfioError) else f"{hardware.name}: {error}"
            raise HostError(
                f"{self.ctx.name}: {text}", hint='irq = "none" passes the registers alone'
            ) from error

    # -- registers and interrupt -----------------------------------------------------------------------

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """A register by one access; all ones where there is none, or none any more."""
        value = (1 << 8 * size) - 1
        hardware = self._hardware
        if hardware is not None and not hardware.revoked and offset + size <= self.options.size:
            self._reads += 1
            try:
                value = hardware.bar_read(self.options.map, offset, size)
            except HardwareError as error:
                self._failed(error)
            self._look_at_line()
        return value

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """A register by one access."""
        hardware = self._hardware
        if hardware is not None and not hardware.revoked and offset + size <= self.options.size:
            self._writes += 1
            try:
                hardware.bar_write(self.options.map, offset, size, value)
            except HardwareError as error:
                self._failed(error)
            self._look_at_line()

    def _interrupt(self) -> None:
        """It came, and is masked in the host (worker thread)."""
        hardware = self._hardware
        try:
            if hardware is None or hardware.revoked or not hardware.take():
                return
            self._interrupts += 1
            if self.options.irq == "edge":
                self.ctx.irq().pulse()
                hardware.enable_interrupt(True)
            else:
                self._high = True
                self.ctx.irq().set(True)
        except HardwareError as error:
            self._failed(error)

    def _look_at_line(self) -> None:
        hardware = self._hardware
        if self._high and hardware is not None:
            self._high = False
            self.ctx.irq().set(False)
            try:
                hardware.enable_interrupt(True)
            except HardwareError as error:
                self._failed(error)

    def _failed(self, error: HardwareError) -> None:
        """Counted, and said ever more rarely: the guest may do it as often as it likes."""
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:
            self.ctx.log.warning("%s: access %d that failed: %s", self.ctx.name, self._failures, error)

    # -- life ------------------------------------------------------------------------------------------

    def on_terminate(self, end: GuestEnd) -> None:
        """Give it back."""
        if self._hardware is not None:
            self._hardware.close()

    def status(self) -> Mapping[str, object]:
        """Which device, and counters."""
        hardware = self._hardware
        return {
            "device": self.options.uio,
            "name": hardware.name if hardware is not None else "",
            "direct": self.options.size if self._address else 0,
            "reads": self._reads,
            "writes": self._writes,
            "failures": self._failures,
            "interrupts": self._interrupts,
        }
