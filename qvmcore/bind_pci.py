"""Freeze for PCI (floor 8): the bus of a machine, its functions, their BARs and interrupts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from qvmcore.bind import DefaultBindings, bind_window
from qvmcore.boards import PciHost
from qvmcore.bus import AddressSpace
from qvmcore.engine import Guest
from qvmcore.errors import PluginError
from qvmcore.layout import pci_routes
from qvmcore.pci.function import PciFunction
from qvmcore.pci.host import ECAM_WINDOW, HostBridge
from qvmcore.pci.intx import SharedLine
from qvmcore.pci.plain import plain_function_of
from qvmcore.pci.ports import CONFIG_PORTS, ConfigPorts
from qvmcore.pci.vdev import PciVdev, function_of, interrupts_of
from qvmcore.plugins import PluginHost
from qvmcore.slot import VdevSlot
from qvmcore.types import IntrSpec, MmioHandler, PciAddress
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.pci import PciTransport


class PciBinding:
    """Connects the PCI vdevs of one machine, on the main thread: interrupts first, functions later."""

    def __init__(
        self, pci: PciHost, slots: Sequence[VdevSlot], host: PluginHost, own: DefaultBindings
    ) -> None:
        self._pci = pci
        self._slots = [slot for slot in slots if slot.spec.pci is not None]
        self._host = host
        self._own = own
        self._routes = pci_routes(pci, [slot.spec for slot in self._slots])

    def bind_irqs(self, guest: Guest) -> None:
        """Before any vdev is configured: its worker may signal at once."""
        for slot in self._slots:
            if issubclass(slot.cls, PciVdev):
                self._own.interrupts[id(slot.vdev)] = interrupts_of(slot.cls)
                for index in range(slot.cls.irqs):
                    slot.lines[index] = self._host.bind_irq(slot.vdev, index, self._route(slot), guest)

    def bind_functions(self, guest: Guest, bus: AddressSpace, ports: AddressSpace | None = None) -> None:
        """When every vdev is configured. Raises PluginError for an impossible function."""
        bridge = HostBridge(bus, self._pci.apertures, guest.signal_msi, guest.listen)
        lines = {
            intr: SharedLine(guest.irq_line(intr), partial(guest.listen_level, intr))
            for intr in set(self._routes.values())
        }
        for slot in self._slots:
            address = slot.spec.pci
            assert address is not None
            function = make_function(slot, self._own)
            config = bind_function(slot, function, self._host, address)
            bridge.add(address, function, config, lines[self._route(slot)], slot.name)
        bridge.start()
        ecam, _ = self._pci.ecam
        bus.insert(ecam, ECAM_WINDOW, MmioHandler(bridge.ecam_read, bridge.ecam_write), "PCI configuration")
        if ports is not None and self._pci.config_ports is not None:
            mechanism = ConfigPorts(bridge.ecam_read, bridge.ecam_write)
            handler = MmioHandler(mechanism.read, mechanism.write)
            ports.insert(self._pci.config_ports, CONFIG_PORTS, handler, "PCI configuration")

    def _route(self, slot: VdevSlot) -> IntrSpec:
        assert slot.spec.pci is not None
        return self._routes[slot.spec.pci.device]


def make_function(slot: VdevSlot, own: DefaultBindings) -> PciFunction:
    """The PCI function of a configured vdev. Raises PluginError for an impossible one."""
    vdev = slot.vdev
    try:
        if isinstance(vdev, VirtioVdev):
            function = PciTransport(vdev, fast_doorbells=own.fast_doorbells).function
            # A device that fails lets its interrupt fall, as every vdev does.
            slot.lines[0] = function.interrupts.line(0)
        elif isinstance(vdev, PciVdev):
            function = function_of(vdev, own.interrupts[id(vdev)])
        else:
            function = plain_function_of(vdev, own.interrupts[id(vdev)])
    except ValueError as error:
        raise PluginError(f"{slot.spec.where}: {error}") from error
    own.functions[id(vdev)] = function
    return function


def bind_function(
    slot: VdevSlot, function: PciFunction, host: PluginHost, address: PciAddress
) -> MmioHandler:
    """Ask the hooks for the handlers of a function; the one of its configuration space, guarded."""
    slot.place_of = partial(_place_of, function)
    for index, bar in enumerate(function.bars):
        function.bind_bar(index, bind_window(slot, host, index, bar.window))
    config = host.bind_pci_config(slot.vdev, address)
    if not isinstance(config, MmioHandler):
        raise PluginError(f"{slot.spec.where}: qvm_bind_pci_config gave {config!r}, not an MmioHandler")
    return slot.guard(config)


def _place_of(function: PciFunction, window: int) -> int | None:
    """Where the guest has put the BAR that a window is."""
    return function.bar_address(function.bars[window].number)
