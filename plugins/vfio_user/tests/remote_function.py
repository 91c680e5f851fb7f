"""What a VMM does around a function behind a vfio-user socket, so that a guest's driver runs on it.

As QEMU does: configuration accesses go to the server, the MSI-X table stays here and only eventfds are
passed, an access to a BAR ends an INTx, accesses that fail read all ones.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qvm_vfio_user.testing import CONFIG_REGION, INTX, MSIX, Client, Irq, Refused

from qvmcore.bus import all_ones
from qvmcore.memory import MemoryRegion
from qvmcore.pci import spec as pci
from qvmcore.testing.fakes import FakeIrq
from qvmcore.testing.pci_driver import PciDevice

_BAR_END = pci.BAR0 + 4 * pci.BAR_COUNT


class Placed(NamedTuple):
    """A BAR that decodes: its number, where, and how many bytes."""

    number: int
    base: int
    size: int


class RemoteFunction:
    """The function behind ``client``: its configuration space, and a bus where its BARs decode.

    INTx is the level of ``irq``, and each MSI-X message one pulse of it; ``vectors`` has the number of
    every message, in order. With ``posted``, stores to BARs do not wait, as in QEMU.
    """

    def __init__(self, client: Client, irq: FakeIrq, *, posted: bool = False, aperture: int = 0) -> None:
        self.client = client
        self.irq = irq
        self.posted = posted
        self.vectors: list[int] = []
        flags, regions, _ = client.info()
        assert flags & 3 == 3, f"flags {flags:#x}: a PCI device that can be reset has 3"
        self.regions = [client.region(index) for index in range(regions)]
        self.vector_count = client.irq(MSIX)[1]
        self._bars: list[Placed] | None = None
        self._lock = threading.RLock()
        self._table = [[0, 0, 0, 1] for _ in range(self.vector_count)]
        self._msix = False
        self._control = self._table_bar = self._table_offset = 0
        self._events = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(self.vector_count + 1)]
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pump = threading.Thread(target=self._listen, name="remote-function")
        self._pump.start()
        self.device = PciDevice(self, aperture or 0x1000_0000)
        if client.irq(INTX)[1]:
            client.set_irqs(Irq.EVENTFD | Irq.TRIGGER, INTX, fds=[self._events[-1]])
        for at, kind in self.device.capabilities():
            if kind == pci.CAP_MSIX:
                where = self.device.read(at + 4)
                self._control, self._table_bar, self._table_offset = at + 2, where & 7, where & ~7

    def share(self, regions: Sequence[MemoryRegion]) -> None:
        """DMA_MAP them."""
        for region in regions:
            self.client.dma_map(region.start, region.size, region.fd)

    def close(self) -> None:
        """Stop listening; the connection is not closed. Idempotent."""
        if self._pump.is_alive():
            os.eventfd_write(self._stop, 1)
            self._pump.join(5)
            assert not self._pump.is_alive()
            for fd in (*self._events, self._stop):
                os.close(fd)

    # ---- configuration space -----------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """A load."""
        return self._load(CONFIG_REGION, offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A store; MSI-X is set up when the guest switches it on."""
        try:
            self.client.write(CONFIG_REGION, offset, size, value)
        except Refused:
            return
        if offset < _BAR_END:
            self._bars = None
        if self._control and offset < self._control + 2 and offset + size > self._control:
            self._switch(bool(self.config_read(self._control, 2) & pci.MSIX_ENABLE))

    # ---- the bus -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Placed]:
        """The BARs that decode now."""
        if self._bars is None:
            self._bars = list(self._decode())
        return iter(self._bars)

    def read(self, address: int, size: int) -> int:
        """A load of the guest; all ones where nothing decodes."""
        found = self._at(address, size)
        if found is None:
            return all_ones(size)
        bar, offset = found
        entry = self._entry(bar, offset)
        if entry is not None:
            vector, field = entry
            return self._table[vector][field] if size == 4 else 0
        value = self._load(bar, offset, size)
        self._end_intx()
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """A store of the guest."""
        found = self._at(address, size)
        if found is None:
            return
        bar, offset = found
        entry = self._entry(bar, offset)
        if entry is not None:
            if size == 4:
                self._program(*entry, value)
            return
        try:
            self.client.write(bar, offset, size, value, posted=self.posted)
        except Refused:
            pass  # as the bus of a guest does with what nobody takes
        self._end_intx()

    # ---- inside ------------------------------------------------------------------------------------

    def _load(self, region: int, offset: int, size: int) -> int:
        if offset + size > self.regions[region].size:
            return all_ones(size)
        try:
            return self.client.read(region, offset, size)
        except Refused:
            return all_ones(size)

    def _decode(self) -> Iterator[Placed]:
        if not self.config_read(pci.COMMAND, 2) & pci.COMMAND_MEMORY:
            return
        for number, region in enumerate(self.regions[: pci.BAR_COUNT]):
            if region.size:
                low = self.config_read(pci.BAR0 + 4 * number, 4)
                high = self.config_read(pci.BAR0 + 4 * number + 4, 4) if low & pci.BAR_64BIT else 0
                yield Placed(number, high << 32 | low & ~pci.BAR_FLAGS, region.size)

    def _at(self, address: int, size: int) -> tuple[int, int] | None:
        for number, base, length in self:
            if base <= address and address + size <= base + length:
                return number, address - base
        return None

    def _entry(self, bar: int, offset: int) -> tuple[int, int] | None:
        """Which entry and which word of it, when this is the MSI-X table."""
        place = offset - self._table_offset
        if not self._control or bar != self._table_bar or not 0 <= place < 16 * self.vector_count:
            return None
        return place // 16, place % 16 // 4

    def _program(self, vector: int, field: int, value: int) -> None:
        with self._lock:
            self._table[vector][field] = value & 1 if field == 3 else value
        if field == 3 and not value & 1 and self._msix:
            self._assign(vector)

    def _switch(self, enabled: bool) -> None:
        if enabled == self._msix:
            return
        self._msix = enabled
        if not enabled:
            self.client.set_irqs(Irq.NONE | Irq.TRIGGER, MSIX, 0, 0)
        for vector in range(self.vector_count if enabled else 0):
            if not self._table[vector][3] & 1:
                self._assign(vector)

    def _assign(self, vector: int) -> None:
        self.client.set_irqs(Irq.EVENTFD | Irq.TRIGGER, MSIX, vector, fds=[self._events[vector]])

    def _end_intx(self) -> None:
        """The end of an interrupt: the server may send the next one."""
        self._take(self.vector_count)
        if self.irq.level:
            self.irq.set(False)
            self.client.set_irqs(Irq.NONE | Irq.UNMASK, INTX)
            self._take(self.vector_count)

    def _take(self, number: int) -> None:
        """Whatever an eventfd has; the last one is INTx."""
        with self._lock:
            try:
                os.eventfd_read(self._events[number])
            except BlockingIOError:
                return
            if number == self.vector_count:
                self.irq.set(True)
            else:
                self.vectors.append(number)
                self.irq.pulse()

    def _listen(self) -> None:
        with select.epoll() as poll:
            poll.register(self._stop, select.EPOLLIN)
            for fd in self._events:
                poll.register(fd, select.EPOLLIN)
            numbers = {fd: number for number, fd in enumerate(self._events)}
            while True:
                for fd, _ in poll.poll():
                    if fd == self._stop:
                        return
                    self._take(numbers[fd])
