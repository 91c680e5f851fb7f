"""A PCI bus with one function on it, for tests without a host bridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qvmcore.bus import AddressSpace, Mapped
from qvmcore.pci.bar import Bar
from qvmcore.pci.function import PciFunction
from qvmcore.pci.sources import Stop
from qvmcore.testing.fake_listening import FakeListening
from qvmcore.types import MmioHandler

if TYPE_CHECKING:
    from qvmcore.testing.fakes import FakeIrq

#: Puts a handler under the fault isolation of the fake machine.
Isolate = Callable[[MmioHandler], MmioHandler]


class FakePciBus:
    """Where a function hangs: its BARs decode on ``bus``, its interrupts end in ``irq``.

    ``irq`` has the level of ``INTA#``, and counts every message as a pulse; ``messages`` are the
    (address, data) of those, in order. ``refused`` are the (BAR number, address) that could not be
    placed because something else decodes there. It is also the function's configuration space.
    """

    def __init__(
        self, function: PciFunction, bus: AddressSpace, irq: FakeIrq, owner: str, isolate: Isolate
    ) -> None:
        self.function = function
        self.messages: list[tuple[int, int]] = []
        self.refused: list[tuple[int, int]] = []
        self.listening = FakeListening(self.messages)
        self._bus = bus
        self._irq = irq
        self._owner = owner
        self._placed: dict[int, Mapped] = {}
        for position, bar in enumerate(function.bars):
            function.bind_bar(position, isolate(bar.handler))
        config = isolate(MmioHandler(function.config_read, function.config_write))
        self.config_read, self.config_write = config.read, config.write
        function.connect(self)

    def message(self, address: int, data: int) -> None:
        """A message-signalled interrupt."""
        self.messages.append((address, data))
        self._irq.pulse()

    def set_intx(self, level: bool) -> None:
        """``INTA#``."""
        self._irq.set(level)

    def pulse_intx(self) -> None:
        """One edge of ``INTA#``."""
        self._irq.pulse()

    def listen(self, fd: int, address: int, data: int) -> Stop | None:
        """As :attr:`listening` has it, which listens to nothing by default."""
        return self.listening.listen(fd, address, data)

    def listen_intx(self, fd: int, resample: int) -> Stop | None:
        """Likewise."""
        return self.listening.listen_level(fd, resample)

    def place(self, bar: Bar, address: int | None) -> None:
        """The guest moved a BAR."""
        old = self._placed.pop(bar.number, None)
        if old is not None:
            self._bus.remove(old)
        if address is not None:
            try:
                self._placed[bar.number] = self._bus.place(address, bar.window, bar.handler, self._owner)
            except ValueError:
                self.refused.append((bar.number, address))
