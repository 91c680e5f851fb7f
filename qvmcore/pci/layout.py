"""Where everything is in configuration space, and which bits a guest may write (floor 4)."""

from __future__ import annotations

from collections.abc import Sequence

from qvmcore.pci import spec
from qvmcore.pci.bar import Bar
from qvmcore.pci.capability import Capability
from qvmcore.types import MmioHandler, PciId


class ConfigLayout:
    """The power-on bytes, the write mask and the handled ranges of one function.

    Raises ValueError when BARs clash or the capabilities do not fit into 256 bytes.
    """

    def __init__(
        self,
        identity: PciId,
        class_code: int,
        bars: Sequence[Bar],
        capabilities: Sequence[Capability],
        intx: bool,
    ) -> None:
        if not 0 <= class_code <= 0xFFFFFF:
            raise ValueError(f"class code {class_code:#x}: expected 24 bits, e.g. 0x018000")
        self.initial = bytearray(spec.CONFIG_SIZE)
        self.mask = bytearray(spec.CONFIG_SIZE)
        #: (start, end, handler) of ranges answered by a handler.
        self.windows: list[tuple[int, int, MmioHandler]] = []
        #: (start, end, capability) of those that are told of writes.
        self.told: list[tuple[int, int, Capability]] = []
        #: Offset of the MSI-X Message Control register.
        self.msix_control: int | None = None
        self._taken = bytearray(b"\1" * spec.HEADER_END + bytes(spec.EXTENDED_SIZE - spec.HEADER_END))
        self._offsets: list[tuple[Capability, int]] = []
        self._put(spec.VENDOR_ID, 2, identity.vendor)
        self._put(spec.DEVICE_ID, 2, identity.device)
        self._put(spec.REVISION_ID, 1, identity.revision)
        self._put(spec.CLASS_CODE, 3, class_code)
        self._put(spec.SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
        self._put(spec.SUBSYSTEM_ID, 2, identity.subsystem)
        self._put(spec.INTERRUPT_PIN, 1, int(intx))
        # What a function does not do, it cannot be told to do: such bits are wired to 0 (6.2.2).
        command = bool(bars) * spec.COMMAND_MEMORY | intx * spec.COMMAND_INTX_DISABLE
        if bars or intx:
            command |= spec.COMMAND_BUS_MASTER
            self.mask[spec.CACHE_LINE_SIZE] = 0xFF
        self.mask[spec.COMMAND : spec.COMMAND + 2] = command.to_bytes(2, "little")
        self.mask[spec.INTERRUPT_LINE] = intx * 0xFF
        self._bars(bars)
        self._chain(capabilities)

    def offset_of(self, capability: Capability) -> int:
        """Where a capability is. Raises ValueError for one that is not in the chain."""
        for each, offset in self._offsets:
            if each is capability:
                return offset
        raise ValueError(f"capability {capability.kind:#x} is not one of this function")

    def is_private(self, offset: int, size: int) -> bool:
        """Whether no byte of the range belongs to the header, a capability, or lies outside."""
        return 0 <= offset <= spec.EXTENDED_SIZE - size and not any(self._taken[offset : offset + size])

    def _put(self, offset: int, size: int, value: int) -> None:
        self.initial[offset : offset + size] = value.to_bytes(size, "little")

    def _bars(self, bars: Sequence[Bar]) -> None:
        owner: dict[int, Bar] = {}
        for bar in bars:
            for number in bar.numbers:
                if number in owner:
                    raise ValueError(f"BAR {number} is used twice; a 64-bit BAR takes two")
                owner[number] = bar
            at, size = spec.BAR0 + 4 * bar.number, 4 * len(bar.numbers)
            self._put(at, size, bar.flags)
            self.mask[at : at + size] = (-bar.window.size & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _chain(self, capabilities: Sequence[Capability]) -> None:
        pointer, at = spec.CAPABILITIES_POINTER, spec.HEADER_END
        for capability in capabilities:
            end = at + capability.size
            if end > spec.CONFIG_SIZE:
                raise ValueError(f"the capabilities do not fit into {spec.CONFIG_SIZE} bytes")
            self.initial[pointer] = at
            self.initial[at] = capability.kind
            self.initial[at + 2 : end] = capability.body
            self.mask[at + 2 : at + 2 + len(capability.writable)] = capability.writable
            self._taken[at:end] = b"\1" * capability.size
            self._offsets.append((capability, at))
            if capability.kind == spec.CAP_MSIX:
                self.msix_control = at + 2
            if capability.written is not None:
                self.told.append((at, end, capability))
            window = capability.window
            if window is not None:
                start = at + window.start
                self.windows.append((start, start + window.size, window.handler))
                self.mask[start : start + window.size] = bytes(window.size)
            pointer, at = at + 1, end + 3 & ~3
        if capabilities:
            self.initial[spec.STATUS] |= spec.STATUS_CAPABILITIES
