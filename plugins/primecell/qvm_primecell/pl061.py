"""vdev ``pl061``: ARM PrimeCell GPIO (DDI 0190), 8 lines, with the power button on one of them.

The guest finds a ``gpio-keys`` node beside the controller. SIGTERM or SIGINT press the key for a
moment; a guest that listens to KEY_POWER powers itself off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from qvm_primecell.identity import identity
from qvmcore.api import FdtNode, GuestEnd, Trigger, Vdev, Window

# Registers, offsets in bytes. GPIODATA takes 0x000-0x3fc: address bits 9:2 are the bit mask.
DATA_END, DIR, IS, IBE, IEV, IE, RIS, MIS, IC, AFSEL = (
    0x400, 0x400, 0x404, 0x408, 0x40C, 0x410, 0x414, 0x418, 0x41C, 0x420,
)  # fmt: skip
PERIPHERAL = (0x61, 0x10, 0x04, 0x00)
KEY_POWER = 116
#: Seconds the key stays down; longer than the 5 ms software debounce of Linux's gpio-keys.
PRESS_SECONDS = 0.1


class Pl061Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the vdev."""

    button: Annotated[int, msgspec.Meta(ge=0, le=7, description="GPIO line of the power button")] = 3


class Pl061(Vdev):
    """The controller: input lines are driven by the host, outputs are only remembered."""

    vdev_type = "pl061"
    summary = "ARM PrimeCell GPIO with the power button (GPIO key)"
    Options = Pl061Options
    windows = (Window(0x1000, access=frozenset({1, 2, 4})),)
    irqs = 1
    trigger = Trigger.LEVEL
    fdt_compatible = ("arm,pl061", "arm,primecell")

    def __init__(self, ctx: object, options: Pl061Options) -> None:
        super().__init__(ctx, options)  # type: ignore[arg-type]
        self.presses = 0
        self._inputs = 0
        self.on_reset()

    def on_reset(self) -> None:
        """Reset values of DDI 0190; the levels of the input lines are the host's and stay."""
        self._data = self._dir = self._afsel = 0
        self._sense = self._both = self._event = self._enable = self._latched = 0

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """A register; identification registers included, reserved ones read as zero."""
        if offset < DATA_END:
            return self._levels() & (offset >> 2)
        values = {
            DIR: self._dir, IS: self._sense, IBE: self._both, IEV: self._event, IE: self._enable,
            RIS: self._raw(), MIS: self._raw() & self._enable, AFSEL: self._afsel,
        }  # fmt: skip
        if offset in values:
            return values[offset]
        return identity(offset, PERIPHERAL) or 0

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """A register; only eight bits count."""
        value &= 0xFF
        if offset < DATA_END:
            mask = (offset >> 2) & self._dir
            self._data = (self._data & ~mask) | (value & mask)
        elif offset == DIR:
            self._dir = value
        elif offset == IS:
            self._sense = value
        elif offset == IBE:
            self._both = value
        elif offset == IEV:
            self._event = value
        elif offset == IE:
            self._enable = value
        elif offset == IC:
            self._latched &= ~value
        elif offset == AFSEL:
            self._afsel = value
        self._update()

    def describe_fdt(self, node: FdtNode) -> None:
        """The controller's own properties, and the gpio-keys node with the power key."""
        node.set_flag("gpio-controller")
        node.set_cells("#gpio-cells", 2)
        node.set_flag("interrupt-controller")
        node.set_cells("#interrupt-cells", 2)
        node.set_cells("clocks", node.reference("/apb-pclk"))
        node.set_string("clock-names", "apb_pclk")
        keys = node.sibling("gpio-keys")
        keys.set_string("compatible", "gpio-keys")
        key = keys.child("poweroff")
        key.set_string("label", "power button")
        key.set_cells("linux,code", KEY_POWER)
        key.set_cells("gpios", node.phandle(), self.options.button, 0)

    def on_button(self) -> bool:
        """Press the key when a driver has enabled its interrupt; else the guest could not notice."""
        if not self._enable >> self.options.button & 1:
            return False
        self.presses += 1
        self.ctx.worker.call(lambda: self._drive(True))
        self.ctx.worker.call_later(PRESS_SECONDS, lambda: self._drive(False))
        return True

    def on_terminate(self, end: GuestEnd) -> None:
        """Nothing of the host is held."""

    def status(self) -> Mapping[str, object]:
        """Line levels and how often the button was pressed."""
        return {"levels": self._levels(), "presses": self.presses}

    def _levels(self) -> int:
        return (self._data & self._dir) | (self._inputs & ~self._dir)

    def _raw(self) -> int:
        level = self._sense & ~(self._levels() ^ self._event)
        return (level | self._latched) & 0xFF

    def _drive(self, high: bool) -> None:
        bit = 1 << self.options.button
        before = self._levels()
        self._inputs = self._inputs | bit if high else self._inputs & ~bit
        changed = (before ^ self._levels()) & ~self._sense
        rising = changed & self._levels()
        falling = changed & ~self._levels()
        self._latched |= (changed & self._both) | (rising & self._event) | (falling & ~self._event)
        self._update()

    def _update(self) -> None:
        self.ctx.irq().set(bool(self._raw() & self._enable))
