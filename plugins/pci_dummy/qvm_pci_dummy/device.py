"""The vdev and its options."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

from qvm_pci_dummy.clone import Identity, read_identity
from qvm_pci_dummy.registers import parse_registers
from qvmcore.api import PciId, PciVdev

_Word = Annotated[int, Meta(ge=0, le=0xFFFF)]

#: Ours, a device number that no QNX vdev has, and the class "unassigned".
_DEFAULT = Identity(0x1C05, 0x00FF, 0, 0xFF0000, 0, 0)


class DummyOptions(Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """Who the function says it is; what is not given comes from ``clone``, or is a default."""

    vendor: Annotated[_Word | None, Meta(description="vendor ID; default 0x1c05")] = None
    device: Annotated[_Word | None, Meta(description="device ID; default 0x00ff")] = None
    class_code: Annotated[
        Annotated[int, Meta(ge=0, le=0xFFFFFF)] | None,
        Meta(description="base class, sub-class, interface; default 0xff0000"),
    ] = field(default=None, name="class")
    revision: Annotated[
        Annotated[int, Meta(ge=0, le=0xFF)] | None, Meta(description="revision ID; default 0")
    ] = None
    subsystem_vendor: Annotated[_Word | None, Meta(description="subsystem vendor ID; default 0")] = None
    subsystem: Annotated[_Word | None, Meta(description="subsystem ID; default 0")] = None
    clone: Annotated[
        str, Meta(description="host device, e.g. 0000:00:1f.0, or a file, to take the identity from")
    ] = ""
    reg: Annotated[
        tuple[str, ...], Meta(description="constant bytes behind the header, e.g. '0x40/4=0x12345678'")
    ] = ()

    def __post_init__(self) -> None:
        parse_registers(self.reg)


class PciDummy(PciVdev):
    """An identity and constant bytes; no BARs, no interrupt, nothing writable."""

    vdev_type = "pci-dummy"
    summary = "an inactive PCI function: a filler for function 0, or an identity"
    Options = DummyOptions

    def on_configured(self) -> None:
        """Find the identity; HostError when the device to clone cannot be read."""
        options: DummyOptions = self.options
        base = read_identity(options.clone, self.ctx.base_dir) if options.clone else _DEFAULT
        self._bytes = parse_registers(options.reg)
        self.pci_class = base.class_code if options.class_code is None else options.class_code
        self.pci_id = PciId(
            base.vendor if options.vendor is None else options.vendor,
            base.device if options.device is None else options.device,
            base.subsystem_vendor if options.subsystem_vendor is None else options.subsystem_vendor,
            base.subsystem if options.subsystem is None else options.subsystem,
            base.revision if options.revision is None else options.revision,
        )

    def config_read(self, offset: int, size: int) -> int:
        """The constant bytes; 0 where none was given."""
        return sum(self._bytes.get(offset + index, 0) << 8 * index for index in range(size))
