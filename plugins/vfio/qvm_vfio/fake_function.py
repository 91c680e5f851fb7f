"""A PCI function of a host that is not there: what :mod:`qvm_vfio.fake` shows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from qvm_quiesce import pci

#: Where its capabilities are.
PM_AT, MSI_AT, MSIX_AT, EXPRESS_AT, VPD_AT = 0x40, 0x48, 0x60, 0x70, 0xB0
_VPD = 0x03


@dataclass
class FakeFunction:
    """A function of the host. ``bars``: number -> (size, low bits of the register)."""

    name: str = "0000:03:00.0"
    group: int = 7
    driver: str = "vfio-pci"
    bars: dict[int, tuple[int, int]] = field(default_factory=lambda: {0: (0x4000, 0x4), 2: (0x20, 0x1)})
    vectors: int = 4
    messages: int = 1
    intx: bool = True
    class_code: int = 0x010802
    vendor: int = 0x8086
    device: int = 0x1234
    resets: str = "flr bus"

    def config(self) -> bytes:
        """Its configuration space at power-on."""
        space = bytearray(4096)

        def put(at: int, size: int, value: int) -> None:
            space[at : at + size] = value.to_bytes(size, "little")

        put(pci.VENDOR_ID, 4, self.vendor | self.device << 16)
        put(pci.STATUS, 2, pci.STATUS_CAPABILITIES)
        put(pci.CLASS_REVISION, 4, self.class_code << 8 | 3)
        put(0x2C, 4, 0x5678_8086)
        put(0x3D, 1, int(self.intx))
        for number, (_, flags) in self.bars.items():
            put(pci.BAR0 + 4 * number, 4, flags)
        chain = {PM_AT: pci.CAP_PM, MSI_AT: pci.CAP_MSI, MSIX_AT: pci.CAP_MSIX}
        chain |= {EXPRESS_AT: pci.CAP_EXPRESS, VPD_AT: _VPD}
        if not self.vectors:
            del chain[MSIX_AT]
        put(pci.CAPABILITIES, 1, PM_AT)
        for (at, kind), following in zip(chain.items(), [*list(chain)[1:], 0], strict=True):
            put(at, 2, kind | following << 8)
        if self.vectors:
            put(MSIX_AT + 2, 2, self.vectors - 1)
        put(EXPRESS_AT + 2, 2, 0x0002)
        put(EXPRESS_AT + pci.EXPRESS_DEVICE_CAPABILITIES, 4, pci.EXPRESS_FLR | 0x8002)
        put(0x100, 4, 0x0010 | 1 << 16)  # SR-IOV
        return bytes(space)


class FakeIrqs:
    """The eventfds of the connected kind of a function's interrupts, and which kind that is."""

    def __init__(self) -> None:
        self.kind: int | None = None
        self.eventfds: list[int] = []
        #: INTx, by the kernel.
        self.masked = False
        #: An eventfd that unmasks it; -1 for none.
        self.resample = -1
