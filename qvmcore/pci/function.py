"""One PCI function (floor 4): a type 0 header, BARs, capabilities, interrupts.

A function knows no host bridge: it hangs on a :class:`FunctionPort`, which places its BARs and takes
its interrupts. Made at freeze, on the main thread; afterwards configuration accesses come from any
vCPU thread.

Configuration space is bytes and a mask of the bits a guest may write, so an access of any size and
offset does what the single bytes would do. Address bits of a BAR below its size are not in the mask:
that is the whole sizing protocol (PCI 3.0, 6.2.5.1).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from qvmcore.pci import spec
from qvmcore.pci.bar import Bar
from qvmcore.pci.capability import Capability
from qvmcore.pci.interrupts import InterruptPort, PciInterrupts
from qvmcore.pci.layout import ConfigLayout
from qvmcore.types import MmioHandler, PciId, Window

#: Accesses to the MSI-X BAR that the standard defines (PCI 3.0, 6.8.2).
_MSIX_ACCESS = frozenset({4, 8})


class FunctionPort(InterruptPort, Protocol):
    """What a function hangs on: our host bridge, or somebody else's bus."""

    def place(self, bar: Bar, address: int | None) -> None:
        """The guest put ``bar`` at a guest-physical address, or disabled it (None).

        Called with the function's lock held, on changes only; an impossible address is the port's
        to refuse, without an exception.
        """


class PciFunction:
    """``class_code`` is base class, sub-class, interface: ``0x018000``.

    ``interrupts`` with vectors adds the MSI-X capability, first in the chain, and a 32-bit BAR with
    table and pending bits: number ``msix_bar``, by default the first free one. ``private`` answers
    accesses that touch neither header nor capability, with offsets from the start of configuration
    space; without it these bytes read 0. Raises ValueError for BARs or capabilities that clash or
    do not fit.
    """

    def __init__(
        self,
        identity: PciId,
        class_code: int,
        *,
        bars: Sequence[Bar] = (),
        capabilities: Sequence[Capability] = (),
        interrupts: PciInterrupts | None = None,
        msix_bar: int | None = None,
        private: MmioHandler | None = None,
    ) -> None:
        self.identity = identity
        self.class_code = class_code
        self.interrupts = interrupts or PciInterrupts(intx=False)
        self._bars = list(bars)
        self._private = private
        #: Told of every change of :attr:`bus_master`, on a vCPU thread with the function's lock held;
        #: once told of False it may wait, bounded, until the device has left guest memory.
        self.on_bus_master: Callable[[bool], None] = lambda master: None
        self._lock = threading.RLock()
        self._port: FunctionPort | None = None
        if self.interrupts.vectors:
            self._bars.append(self._msix_bar(msix_bar))
            capabilities = (self._msix_capability(), *capabilities)
        self._layout = ConfigLayout(identity, class_code, self._bars, capabilities, self.interrupts.intx)
        self._bytes = bytearray(self._layout.initial)
        self._placed: dict[int, int] = {}

    # ---- for devices and transports ------------------------------------------------------------

    @property
    def bars(self) -> Sequence[Bar]:
        """The BARs in the order given, the MSI-X BAR last."""
        return tuple(self._bars)

    @property
    def bus_master(self) -> bool:
        """Whether the guest allows the function to access memory (Command bit 2). Any thread."""
        return bool(self._bytes[spec.COMMAND] & spec.COMMAND_BUS_MASTER)

    def bar_address(self, number: int) -> int | None:
        """Where the BAR is decoded now, None when it is not. Any thread."""
        return self._placed.get(number)

    def bar_read(self, number: int, offset: int, size: int) -> int:
        """An access to a BAR that does not come over the bus (virtio 1.4, 4.1.4.9). Checked:
        outside of the BAR, of a size it does not take, or of no BAR gives all ones."""
        bar = self._bar(number)
        if bar is None or size not in bar.window.access or not 0 <= offset <= bar.window.size - size:
            return (1 << 8 * size) - 1
        return bar.handler.read(offset, size)

    def bar_write(self, number: int, offset: int, size: int, value: int) -> None:
        """As :meth:`bar_read`; an impossible write is dropped."""
        bar = self._bar(number)
        if bar is not None and size in bar.window.access and 0 <= offset <= bar.window.size - size:
            bar.handler.write(offset, size, value)

    def offset_of(self, capability: Capability) -> int:
        """Where the capability starts in configuration space."""
        return self._layout.offset_of(capability)

    def read_capability(self, capability: Capability) -> bytes:
        """The bytes of a capability as the guest left them, from its ID on. Any thread."""
        start = self._layout.offset_of(capability)
        return bytes(self._bytes[start : start + capability.size])

    # ---- for the port ----------------------------------------------------------------------------

    def connect(self, port: FunctionPort, *, multifunction: bool = False) -> None:
        """Hang the function on its bus, before the guest starts."""
        self._port = port
        self._bytes[spec.HEADER_TYPE] = multifunction * spec.HEADER_MULTIFUNCTION
        self.interrupts.connect(port)

    def bind_bar(self, position: int, handler: MmioHandler) -> None:
        """Replace the handler of ``bars[position]``, before the guest starts."""
        old = self._bars[position]
        self._bars[position] = Bar(old.number, old.window, handler, old.wide, old.prefetchable)

    def config_read(self, offset: int, size: int) -> int:
        """``size`` bytes at ``offset`` of the 4096; bytes outside of it are all ones."""
        handled = self._window_at(offset, size)
        if handled is not None:
            start, handler = handled
            return handler.read(offset - start, size)
        value = 0
        with self._lock:
            for index in range(size):
                value |= self._byte(offset + index) << 8 * index
        return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write what of ``value`` the guest may change; the rest is dropped."""
        handled = self._window_at(offset, size)
        if handled is not None:
            start, handler = handled
            handler.write(offset - start, size, value)
            return
        with self._lock:
            was_master = self.bus_master
            mask = self._layout.mask
            for index in range(size):
                at = offset + index
                if 0 <= at < spec.CONFIG_SIZE:
                    bits = value >> 8 * index & 0xFF
                    self._bytes[at] = self._bytes[at] & ~mask[at] | bits & mask[at]
            if was_master and not self.bus_master:
                # What the device does last may still interrupt.
                self.on_bus_master(False)
            self._written(offset, offset + size)
            if self.bus_master and not was_master:
                self.on_bus_master(True)

    def reset(self) -> None:
        """Configuration space, BARs and MSI-X table as after power-on; not the device behind it."""
        with self._lock:
            was_master = self.bus_master
            multifunction = self._bytes[spec.HEADER_TYPE]
            self._bytes[:] = self._layout.initial
            self._bytes[spec.HEADER_TYPE] = multifunction
            if was_master:
                self.on_bus_master(False)
            self.interrupts.reset()
            self._place_bars()
            for first, behind, capability in self._layout.told:
                if capability.written is not None:
                    capability.written(bytes(self._bytes[first:behind]))

    # ---- inside ------------------------------------------------------------------------------------

    def _written(self, start: int, end: int) -> None:
        """Consequences of a write to [start, end); lock held."""
        if start < spec.COMMAND + 2 and end > spec.COMMAND:
            command = int.from_bytes(self._bytes[spec.COMMAND : spec.COMMAND + 2], "little")
            self.interrupts.set_command(command)
            self._place_bars()
        elif start < spec.BAR0 + 4 * spec.BAR_COUNT and end > spec.BAR0:
            self._place_bars()
        control = self._layout.msix_control
        if control is not None and start < control + 2 and end > control:
            self.interrupts.set_control(int.from_bytes(self._bytes[control : control + 2], "little"))
        for first, behind, capability in self._layout.told:
            if start < behind and end > first and capability.written is not None:
                capability.written(bytes(self._bytes[first:behind]))

    def _place_bars(self) -> None:
        enabled = self._bytes[spec.COMMAND] & spec.COMMAND_MEMORY
        for bar in self._bars:
            at = spec.BAR0 + 4 * bar.number
            raw = int.from_bytes(self._bytes[at : at + 4 * len(bar.numbers)], "little")
            address = raw & ~spec.BAR_FLAGS if enabled else None
            if address == self._placed.get(bar.number):
                continue
            if address is None:
                del self._placed[bar.number]
            else:
                self._placed[bar.number] = address
            if self._port is not None:
                self._port.place(bar, address)

    def _byte(self, at: int) -> int:
        if not 0 <= at < spec.EXTENDED_SIZE:
            return 0xFF
        if at >= spec.CONFIG_SIZE:
            return 0
        if at == spec.STATUS and self.interrupts.level:
            return self._bytes[at] | spec.STATUS_INTERRUPT
        return self._bytes[at]

    def _window_at(self, offset: int, size: int) -> tuple[int, MmioHandler] | None:
        """Who answers instead of stored bytes, and where its offsets start; None for nobody."""
        for start, end, handler in self._layout.windows:
            if start <= offset and offset + size <= end:
                return start, handler
        if self._private is not None and self._layout.is_private(offset, size):
            return 0, self._private
        return None

    def _bar(self, number: int) -> Bar | None:
        for bar in self._bars:
            if bar.number == number:
                return bar
        return None

    def _msix_bar(self, number: int | None) -> Bar:
        taken = {each for bar in self._bars for each in bar.numbers}
        if number is None:
            free = [each for each in range(spec.BAR_COUNT) if each not in taken]
            if not free:
                raise ValueError("no BAR is left for the MSI-X table")
            number = free[0]
        window = Window(self.interrupts.bar_size, _MSIX_ACCESS)
        return Bar(number, window, MmioHandler(self.interrupts.table_read, self.interrupts.table_write))

    def _msix_capability(self) -> Capability:
        number, control = self._bars[-1].number, self.interrupts.vectors - 1
        body = control.to_bytes(2, "little")
        body += number.to_bytes(4, "little")
        body += (self.interrupts.pba_offset | number).to_bytes(4, "little")
        writable = (spec.MSIX_ENABLE | spec.MSIX_FUNCTION_MASK).to_bytes(2, "little")
        return Capability(spec.CAP_MSIX, body, writable)
