"""What a function was like when it was taken, before any guest had it.

Bus mastering is cleared before anything is read, so the record can never bring it back. The record is
what the function is compared with, and restored to, at the end: never the guest's configuration.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qvm_quiesce import pci
from qvm_quiesce.hardware import Hardware, HardwareError


@dataclass(frozen=True, slots=True)
class AttachRecord:
    """One function as it was attached. ``config`` is its header, 64 bytes; offsets are bytes."""

    device: str
    vendor: int
    product: int
    class_code: int
    config: bytes
    capabilities: dict[int, int] = field(default_factory=dict)
    extended: dict[int, int] = field(default_factory=dict)
    resets: tuple[str, ...] = ()
    #: No PCI function: all numbers above are 0 then, and there is no configuration.
    platform: bool = False

    @property
    def command(self) -> int:
        """The command register of the record; bus mastering is off in it."""
        return int.from_bytes(self.config[pci.COMMAND : pci.COMMAND + 2], "little")

    @property
    def identity(self) -> str:
        """``vendor:product class``, as lspci writes them."""
        if self.platform:
            return "platform device"
        return f"{self.vendor:04x}:{self.product:04x} class {self.class_code:06x}"

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; see :meth:`from_json`."""
        return {**asdict(self), "config": self.config.hex(), "resets": list(self.resets)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> AttachRecord:
        """The record again. Raises ValueError or TypeError for what :meth:`to_json` cannot have made."""
        maps = {
            key: {int(cap): int(at) for cap, at in values[key].items()}
            for key in ("capabilities", "extended")
        }
        config, resets = bytes.fromhex(values["config"]), tuple(values["resets"])
        return cls(**{**values, **maps, "config": config, "resets": resets})


def attach(hardware: Hardware) -> AttachRecord:
    """Clear bus mastering and record the function. Raises HardwareError when it does not answer."""
    if hardware.platform:
        return AttachRecord(hardware.name, 0, 0, 0, b"", platform=True)
    vendor = hardware.config_read(pci.VENDOR_ID, 2)
    if vendor == pci.ABSENT:
        raise HardwareError(f"{hardware.name} does not answer: its configuration space reads all ones")
    command = hardware.config_read(pci.COMMAND, 2)
    hardware.config_write(pci.COMMAND, 2, command & ~pci.COMMAND_BUS_MASTER)
    if hardware.config_read(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER:
        raise HardwareError(f"{hardware.name}: bus mastering cannot be cleared")
    words = (hardware.config_read(offset, 4) for offset in range(0, pci.HEADER_SIZE, 4))
    config = b"".join(word.to_bytes(4, "little") for word in words)
    return AttachRecord(
        hardware.name,
        vendor,
        int.from_bytes(config[2:4], "little"),
        int.from_bytes(config[9:12], "little"),
        config,
        pci.capabilities(hardware.config_read),
        pci.extended_capabilities(hardware.config_read),
        tuple(hardware.resets),
    )
