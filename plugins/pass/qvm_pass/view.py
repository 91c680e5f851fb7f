"""What the guest sees of a physical function: a configuration space made anew, of what is known to be safe.

Nothing reaches the guest because it is there: identity, memory BARs, and some capabilities. So SR-IOV,
ATS, PRI, PASID and all others of the extended space are not there for it, and neither are I/O BARs, the
expansion ROM and registers private to the device. MSI is ours, and so is MSI-X, whose table is in a BAR of
its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qvm_quiesce import pci
from qvm_vfio import structs
from qvm_vfio.hardware import VfioHardware

from qvmcore.api import BarWindow, Capability, ConfigWindow, DirectPart, MmioHandler, PciId

_BAR_IO, _BAR_TYPE, _BAR_64, _BAR_PREFETCHABLE = 0x1, 0x6, 0x4, 0x8
#: Bytes behind the header, and what our MSI-X capability takes of them.
_ROOM, _MSIX_SIZE = 192, 12
_VENDOR = 0x09
#: PCI Express 7.5.3: type 9 is an endpoint on a root bus, which has no link; error reporting by role.
_EXPRESS_SIZE, _EXPRESS_V2, _INTEGRATED, _ROLE_BASED = 0x3C, 2, 9 << 4, 1 << 15
_PM_NO_SOFT_RESET = 1 << 3

_KINDS = {
    0x01: "PM", 0x03: "VPD", 0x05: "MSI", 0x07: "PCI-X", 0x09: "vendor-specific", 0x0D: "subsystem",
    0x10: "PCI Express", 0x11: "MSI-X", 0x12: "SATA", 0x13: "AF", 0x14: "EA",
}  # fmt: skip
_EXTENDED = {
    0x01: "AER", 0x03: "serial number", 0x0E: "ARI", 0x0F: "ATS", 0x10: "SR-IOV", 0x13: "PRI",
    0x15: "resizable BAR", 0x18: "LTR", 0x19: "secondary PCI Express", 0x1B: "PASID", 0x1D: "DPC",
    0x1E: "L1 PM", 0x1F: "PTM", 0x23: "DVSEC", 0x25: "data link", 0x2E: "DOE",
}  # fmt: skip


@dataclass
class View:
    """The guest's side of a function. ``hidden`` are the names of what it does not see."""

    identity: PciId
    class_code: int
    vectors: int
    intx: bool
    bars: list[BarWindow] = field(default_factory=list)
    capabilities: list[Capability] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)


def view_of(
    hardware: VfioHardware,
    most_vectors: int,
    flr: Callable[[], None],
    msi: Capability | None = None,
    *,
    direct: bool = False,
) -> View:
    """Look at a function. ``flr`` is called, on a vCPU thread, when the guest asks for a reset of it.

    ``msi`` is what it has for one; ``direct``: BARs may be mapped into the guest. Raises HardwareError when
    it does not answer.
    """

    def word(offset: int, size: int = 2) -> int:
        return hardware.config_read(offset, size)

    identity = PciId(word(0x00), word(0x02), word(0x2C), word(0x2E), word(0x08, 1))
    irqs = hardware.device.irqs
    vectors = min(irqs.get(structs.MSIX, 0), most_vectors)
    view = View(identity, word(0x09, 1) | word(0x0A) << 8, vectors, bool(irqs.get(structs.INTX, 0)))
    _bars(hardware, view, direct)
    _capabilities(hardware, view, flr, msi)
    extended = pci.extended_capabilities(hardware.config_read)
    view.hidden += [_EXTENDED.get(kind, f"extended capability {kind:#x}") for kind in extended]
    return view


def _bars(hardware: VfioHardware, view: View, direct: bool) -> None:
    number = 0
    while number < pci.BAR_COUNT:
        flags = hardware.config_read(pci.BAR0 + 4 * number, 4)
        region = hardware.device.regions.get(number)
        wide = not flags & _BAR_IO and flags & _BAR_TYPE == _BAR_64
        if region is not None and flags & _BAR_IO:
            view.hidden.append(f"I/O BAR {number}")
        elif region is not None:
            prefetchable = bool(flags & _BAR_PREFETCHABLE)
            parts = tuple(DirectPart(*part) for part in hardware.direct(number)) if direct else ()
            bar = BarWindow(region.size, wide=wide, prefetchable=prefetchable, number=number, direct=parts)
            view.bars.append(bar)
        number += 1 + wide
    if structs.ROM_REGION in hardware.device.regions:
        view.hidden.append("expansion ROM")


def _capabilities(
    hardware: VfioHardware, view: View, flr: Callable[[], None], msi: Capability | None
) -> None:
    room = _ROOM - _MSIX_SIZE * bool(view.vectors)
    for kind, at in pci.capabilities(hardware.config_read).items():
        made = None
        if kind == pci.CAP_PM:
            made = _power(hardware.config_read(at + 2, 2))
        elif kind == pci.CAP_EXPRESS:
            made = _express(bool(hardware.resets), flr)
        elif kind == pci.CAP_MSI:
            made = msi
        elif kind == _VENDOR:
            made = _vendor(hardware, at)
        size = (made.size + 3 & ~3) if made is not None else 0
        if made is not None and size <= room:
            room -= size
            view.capabilities.append(made)
        elif kind != pci.CAP_MSIX or not view.vectors:
            view.hidden.append(_KINDS.get(kind, f"capability {kind:#x}"))


def _power(physical: int) -> Capability:
    """D0 and D3hot that the guest can switch between; the device stays in D0. No power events."""
    body = (physical & 0x7).to_bytes(2, "little") + _PM_NO_SOFT_RESET.to_bytes(4, "little")
    return Capability(pci.CAP_PM, body, b"\0\0\x03\0")


def _express(can_reset: bool, flr: Callable[[], None]) -> Capability:
    """An endpoint without a link. Its Device Control is ours: payload and request sizes are the host's."""
    control = 0

    def read(offset: int, size: int) -> int:
        return control >> 8 * offset & (1 << 8 * size) - 1

    def write(offset: int, size: int, value: int) -> None:
        nonlocal control
        mask = (1 << 8 * size) - 1 << 8 * offset
        wanted = control & ~mask | value << 8 * offset & mask
        if wanted & pci.EXPRESS_START_FLR and can_reset:
            wanted = 0
            flr()
        # Device Status, the upper half, has no errors to clear.
        control = wanted & 0x7FFF

    body = bytearray(_EXPRESS_SIZE - 2)
    body[0:2] = (_EXPRESS_V2 | _INTEGRATED).to_bytes(2, "little")
    body[2:6] = (_ROLE_BASED | pci.EXPRESS_FLR * can_reset).to_bytes(4, "little")
    window = ConfigWindow(pci.EXPRESS_DEVICE_CONTROL, 4, MmioHandler(read, write))
    return Capability(pci.CAP_EXPRESS, bytes(body), window=window)


def _vendor(hardware: VfioHardware, at: int) -> Capability | None:
    """As it is now, read-only; its third byte is its length."""
    size = hardware.config_read(at + 2, 1)
    if not 3 <= size <= pci.CONFIG_SIZE - at:
        return None
    return Capability(_VENDOR, bytes(hardware.config_read(at + n, 1) for n in range(2, size)))
