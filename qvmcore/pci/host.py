"""PCI bus 0 (floor 4): the host bridge, ECAM, and the places of BARs.

ECAM: PCI Express Base, 7.2.2. A BAR is decoded when it lies in one of the apertures and over no
other window; else it is as if it were disabled, which is said once, and it is tried again whenever a
BAR moves. So a guest that puts a BAR somewhere impossible only loses that BAR.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvmcore.bus import AddressSpace, Mapped, all_ones
from qvmcore.pci import spec
from qvmcore.pci.bar import Bar
from qvmcore.pci.function import PciFunction
from qvmcore.pci.intx import SharedLine
from qvmcore.pci.sources import Stop
from qvmcore.types import MmioHandler, PciAddress, PciId, Window

log = logging.getLogger("qvm.pci")

#: QNX's host bridge.
HOST_BRIDGE_ID = PciId(0x1C05, 0x0002)
HOST_BRIDGE_CLASS = 0x060000
HOST_BRIDGE_ADDRESS = PciAddress(0)

#: The ECAM window of one bus.
ECAM_WINDOW = Window(1 << spec.ECAM_BUS_SHIFT, frozenset({1, 2, 4}))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A BAR the guest has enabled at ``address``."""

    owner: str
    bar: Bar
    address: int


class HostBridge:
    """Bus 0 with the host bridge at 00:00.0. Build on the main thread, :meth:`start`, then any thread.

    ``apertures`` are the (base, size) ranges BARs may be placed in; ``message`` takes MSI messages, and
    ``listen(fd, address, data)`` eventfds that stand for one.
    """

    def __init__(
        self,
        bus: AddressSpace,
        apertures: Sequence[tuple[int, int]],
        message: Callable[[int, int], None],
        listen: Callable[[int, int, int], Stop | None] = lambda fd, address, data: None,
    ) -> None:
        self._bus = bus
        self._apertures = apertures
        self.message = message
        self.listen = listen
        self._functions: dict[PciAddress, tuple[PciFunction, MmioHandler, SharedLine | None, str]] = {}
        self._table: list[MmioHandler | None] = [None] * (spec.DEVICES * spec.FUNCTIONS)
        self._lock = threading.Lock()
        self._wanted: dict[tuple[PciAddress, int], _Wanted] = {}
        self._mapped: dict[tuple[PciAddress, int], Mapped] = {}
        self._told: set[tuple[PciAddress, int]] = set()
        bridge = PciFunction(HOST_BRIDGE_ID, HOST_BRIDGE_CLASS)
        self.add(HOST_BRIDGE_ADDRESS, bridge, MmioHandler(bridge.config_read, bridge.config_write), None, "")

    def add(
        self,
        address: PciAddress,
        function: PciFunction,
        config: MmioHandler,
        intx: SharedLine | None,
        owner: str,
    ) -> None:
        """Put a function on the bus; ``config`` answers its configuration accesses, ``intx`` is where
        its ``INTA#`` goes, ``owner`` names it in listings. Raises ValueError for a taken place."""
        if address in self._functions:
            raise ValueError(f"{owner}: {address} is taken")
        self._functions[address] = (function, config, intx, owner)

    def start(self) -> None:
        """Connect all functions; none may be added afterwards. Before the guest starts."""
        counts = Counter(address.device for address in self._functions)
        for address, (function, config, intx, owner) in self._functions.items():
            self._table[address.device * spec.FUNCTIONS + address.function] = config
            port = _Port(self, address, intx, owner)
            function.connect(port, multifunction=counts[address.device] > 1)

    # ---- ECAM: vCPU threads --------------------------------------------------------------------

    def ecam_read(self, offset: int, size: int) -> int:
        """A configuration read; nobody there, or across two functions: all ones."""
        register = offset & spec.EXTENDED_SIZE - 1
        config = self._table[offset >> spec.ECAM_FUNCTION_SHIFT]
        if config is None or register + size > spec.EXTENDED_SIZE:
            return all_ones(size)
        return config.read(register, size)

    def ecam_write(self, offset: int, size: int, value: int) -> None:
        """A configuration write; dropped likewise."""
        register = offset & spec.EXTENDED_SIZE - 1
        config = self._table[offset >> spec.ECAM_FUNCTION_SHIFT]
        if config is not None and register + size <= spec.EXTENDED_SIZE:
            config.write(register, size, value)

    # ---- BARs: any thread ------------------------------------------------------------------------

    def move(self, place: PciAddress, owner: str, bar: Bar, address: int | None) -> None:
        """The guest enabled, moved or disabled (None) a BAR of the function at ``place``."""
        key = (place, bar.number)
        with self._lock:
            old = self._mapped.pop(key, None)
            if old is not None:
                self._bus.remove(old)
            self._wanted.pop(key, None)
            if address is not None:
                self._wanted[key] = _Wanted(owner, bar, address)
            # What has gone may have been in another one's way.
            for each, wanted in self._wanted.items():
                if each not in self._mapped:
                    self._try(each, wanted)

    def _try(self, key: tuple[PciAddress, int], wanted: _Wanted) -> None:
        bar, address = wanted.bar, wanted.address
        name = f"{wanted.owner} BAR {bar.number}"
        if not any(base <= address and address + bar.window.size <= base + size
                   for base, size in self._apertures):  # fmt: skip
            # Address 0 is an unassigned BAR, all ones is how its size is found.
            if address not in (0, -bar.window.size & (1 << bar.bits) - 1):
                self._tell(key, f"{name} at {address:#x} is outside of the PCI windows")
            return
        try:
            self._mapped[key] = self._bus.place(address, bar.window, bar.handler, name)
        except ValueError as error:
            self._tell(key, str(error))

    def _tell(self, key: tuple[PciAddress, int], text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            log.warning("%s: not decoded (said once): %s", key[0], text)


class _Port:
    """A function's connection to the bus."""

    def __init__(self, bridge: HostBridge, address: PciAddress, intx: SharedLine | None, owner: str) -> None:
        self._bridge = bridge
        self._address = address
        self._intx = intx
        self._owner = owner

    def message(self, address: int, data: int) -> None:
        """An MSI message."""
        self._bridge.message(address, data)

    def set_intx(self, level: bool) -> None:
        """Drive the shared line."""
        if self._intx is not None:
            self._intx.drive(self, level)

    def pulse_intx(self) -> None:
        """Signal the shared line once."""
        if self._intx is not None:
            self._intx.pulse()

    def listen(self, fd: int, address: int, data: int) -> Stop | None:
        """A message by an eventfd."""
        return self._bridge.listen(fd, address, data)

    def listen_intx(self, fd: int, resample: int) -> Stop | None:
        """The shared line by an eventfd."""
        return self._intx.listen(fd, resample) if self._intx is not None else None

    def place(self, bar: Bar, address: int | None) -> None:
        """Decode the BAR there."""
        self._bridge.move(self._address, self._owner, bar, address)
