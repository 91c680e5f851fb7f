"""Interrupts of one PCI function (floor 4): MSI-X with mask and pending bits, MSI, or INTx.

MSI-X: PCI 3.0, 6.8.2. INTx: PCI 3.0, 2.2.6; one level line, ``INTA#``, for all sources. The registers of
MSI are a capability of the vdev's, which says here what they mean: :meth:`PciInterrupts.set_msi`.

The object exists before its function, so that a vdev may signal from ``on_configured``. Everything
here is safe from any thread; the lock is held while a message is sent, so messages of one vector
keep their order with mask writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from qvmcore.pci import spec
from qvmcore.pci.line import FunctionLine
from qvmcore.pci.msix import MsixTable
from qvmcore.pci.sources import Source, Stop, Way, waiting

#: ``INTA#`` among the vectors.
_INTX = -1


class InterruptPort(Protocol):
    """Where interrupts of a function go; any thread, must not block."""

    def message(self, address: int, data: int) -> None:
        """A message-signalled interrupt: ``data`` (32 bits) written to ``address``."""

    def set_intx(self, level: bool) -> None:
        """Drive ``INTA#``; only called on changes."""

    def pulse_intx(self) -> None:
        """Signal ``INTA#`` once, so that it is not lost; the line is low before and after."""

    def listen(self, fd: int, address: int, data: int) -> Stop | None:
        """Send the message whenever the eventfd is signalled; None when the engine cannot."""

    def listen_intx(self, fd: int, resample: int) -> Stop | None:
        """Drive ``INTA#`` by it; see :meth:`qvmcore.engine.Guest.listen_level`."""


class PciInterrupts:
    """``vectors`` MSI-X vectors (0 = no MSI-X capability, at most 2048) and ``INTA#``.

    ``intx=False`` is a function without an interrupt pin.
    """

    def __init__(self, vectors: int = 0, *, intx: bool = True) -> None:
        self.intx = intx
        #: Told on a vCPU thread, with the function's lock held, when the guest switches MSI-X on or off.
        self.on_msix: Callable[[bool], None] = lambda enabled: None
        #: Whoever keeps the MSI-X table instead of us takes the vectors here, any thread; set before the
        #: guest starts. Masked vectors are then his business.
        self.on_vector: Callable[[int], None] | None = None
        #: Whether the device asks for INTx by a line that is not driven here; any thread, with the function's
        #: lock held.
        self.asks: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._port: InterruptPort | None = None
        self.resize(vectors)
        self._pending = 0
        self._enabled = self._function_mask = False
        self._bus_master = False
        self._sources = 0  # levels of the lines, bit = line number
        self._intx_disabled = False
        self._intx_out = False
        self._msi: tuple[tuple[int, int] | None, ...] = ()
        self._followed: dict[int, Source] = {}
        self._silent = False

    def resize(self, vectors: int) -> None:
        """Another number of vectors, before the function is made. Raises ValueError."""
        self._table = MsixTable(vectors)
        self.vectors = vectors

    # ---- for devices and transports ----------------------------------------------------------

    @property
    def msix_enabled(self) -> bool:
        """Whether the guest switched to MSI-X; INTx is silent then. Any thread."""
        return self._enabled

    @property
    def level(self) -> bool:
        """Whether the device asks for INTx now: the Interrupt Status bit."""
        return self._sources != 0 or self.asks()

    def signal(self, vector: int) -> None:
        """Send the message of ``vector``, or remember it while it is masked.

        Nothing happens for a vector that does not exist (virtio's NO_VECTOR) or while MSI-X is
        disabled. A function that may not master the bus cannot send: the vector stays pending.
        """
        if self.on_vector is not None:
            if self._enabled and 0 <= vector < self.vectors:
                self.on_vector(vector)
            return
        with self._lock:
            if 0 <= vector < (self.vectors if self._enabled else len(self._msi)):
                self._pending |= 1 << vector
                self._deliver(1 << vector)

    def set_intx(self, level: bool, source: int = 0) -> None:
        """Drive ``INTA#``: the wired-or of all sources (numbers from 0, the device's own choice)."""
        with self._lock:
            bit = 1 << source
            self._sources = self._sources | bit if level else self._sources & ~bit
            self._update_intx()

    def pulse_intx(self) -> None:
        """Signal ``INTA#`` once, for a source that does not hold a level."""
        with self._lock:
            if self._port is not None and self._intx_may and not self._intx_out:
                self._port.pulse_intx()

    def line(self, index: int) -> FunctionLine:
        """Source ``index`` as an :class:`~qvmcore.irq.IrqLine`: vector ``index``, or INTx."""
        return FunctionLine(self, index)

    # ---- eventfds that somebody else signals ---------------------------------------------------

    def follow(self, vector: int, fd: int, turned: Callable[[Way], None]) -> None:
        """From now on every signal of an eventfd is one of ``vector``, with no thread of ours if possible.

        ``turned`` is told of each change: WATCHED means that the caller takes its counts and calls
        :meth:`signal`, with the other two nobody may read it. It is called with a lock held, so it must
        neither block nor call back. The eventfd stays open until :meth:`unfollow`.
        """
        self._follow(vector, fd, lambda port, message: port.listen(fd, *message), turned)

    def follow_intx(self, fd: int, resample: int, turned: Callable[[Way], None]) -> None:
        """The same for ``INTA#``: while STRAIGHT, ``resample`` is signalled when the guest has served it."""
        self._follow(_INTX, fd, lambda port, _message: port.listen_intx(fd, resample), turned)

    def unfollow(self) -> None:
        """No interrupt comes of followed eventfds once this returns; their counts stay in them."""
        with self._lock:
            for source in self._followed.values():
                source.go(None)
            self._followed.clear()

    def silence(self) -> None:
        """Nothing interrupts the guest any more, whatever it or the device does: that was taken away."""
        with self._lock:
            self._silent = True
            self._update()

    def set_msi(self, messages: Sequence[tuple[int, int] | None]) -> None:
        """MSI is on, with these messages (address, data), None while masked; with none of them it is off."""
        with self._lock:
            if self._msi and not messages and not self._enabled:
                self._pending = 0
            self._msi = tuple(messages)
            self._update()

    @property
    def pending(self) -> int:
        """The pending bits, vector 0 lowest. Any thread."""
        with self._lock:
            return self._pending | waiting((n, each) for n, each in self._followed.items() if n != _INTX)

    # ---- for the function ----------------------------------------------------------------------

    def connect(self, port: InterruptPort) -> None:
        """Where messages and INTx go; before the guest starts."""
        with self._lock:
            self._port = port
            self._update()

    def set_command(self, command: int) -> None:
        """The Command register changed: Bus Master and INTx Disable."""
        with self._lock:
            self._bus_master = bool(command & spec.COMMAND_BUS_MASTER)
            self._intx_disabled = bool(command & spec.COMMAND_INTX_DISABLE)
            self._update()

    def set_control(self, control: int) -> None:
        """The MSI-X Message Control register changed: Enable and Function Mask."""
        with self._lock:
            was_enabled, self._enabled = self._enabled, bool(control & spec.MSIX_ENABLE)
            self._function_mask = bool(control & spec.MSIX_FUNCTION_MASK)
            if was_enabled and not self._enabled:
                self._pending = 0
            self._update()
        if was_enabled != self._enabled:
            self.on_msix(self._enabled)

    def reset(self) -> None:
        """As after power-on; the levels of the sources stay, they are the device's."""
        with self._lock:
            was_enabled = self._enabled
            self._table.reset()
            self._pending = 0
            self._enabled = self._function_mask = self._bus_master = self._intx_disabled = False
            self._msi = ()
            self._update()
        if was_enabled:
            self.on_msix(False)

    @property
    def pba_offset(self) -> int:
        """Where the pending bits start in the MSI-X BAR: directly behind the table."""
        return self._table.size

    @property
    def bar_size(self) -> int:
        """Bytes of the MSI-X BAR: table and pending bits, at least one page."""
        return self._table.bar_size

    def table_read(self, offset: int, size: int) -> int:
        """The MSI-X BAR: aligned reads of 4 and 8 bytes; anything else gives 0."""
        if size not in (4, 8) or offset % size:
            return 0
        if offset >= self.pba_offset:
            return self.pending >> 8 * (offset - self.pba_offset) & (1 << 8 * size) - 1
        return self._table.read(offset, size)

    def table_write(self, offset: int, size: int, value: int) -> None:
        """The MSI-X BAR: aligned writes of 4 and 8 bytes to the table; pending bits are read-only."""
        if size not in (4, 8) or offset % size or offset >= self.pba_offset:
            return
        vector = offset // spec.MSIX_ENTRY_SIZE
        with self._lock:
            self._table.write(offset, size, value)
            self._deliver(self._pending & 1 << vector)
            self._steer(vector)

    # ---- inside ----------------------------------------------------------------------------------

    def _update(self) -> None:
        """After a change that may be one for every vector."""
        self._update_intx()
        self._deliver(self._pending)
        for vector in self._followed:
            self._steer(vector)

    def _deliver(self, wanted: int) -> None:
        port = self._port
        while wanted and port is not None:
            vector = (wanted & -wanted).bit_length() - 1
            wanted &= wanted - 1
            message = self._message(vector)
            if message is not None:
                self._pending &= ~(1 << vector)
                port.message(*message)

    def _message(self, vector: int) -> tuple[int, int] | None:
        """What a vector sends now; None while it may not."""
        if self._silent or not self._bus_master:
            return None
        if not self._enabled:
            return self._msi[vector] if vector < len(self._msi) else None
        return None if self._function_mask else self._table.message(vector)

    def _follow(
        self,
        vector: int,
        fd: int,
        listen: Callable[[InterruptPort, tuple[int, int]], Stop | None],
        turned: Callable[[Way], None],
    ) -> None:
        with self._lock:
            if self._silent or vector in self._followed:
                return

            def ask(message: tuple[int, int]) -> Stop | None:
                return listen(self._port, message) if self._port is not None else None

            self._followed[vector] = Source(fd, ask, turned)
            self._steer(vector)

    def _steer(self, vector: int) -> None:
        """Tell a followed eventfd what it stands for now."""
        source = self._followed.get(vector)
        if source is None:
            return
        if vector == _INTX:
            source.go((0, 0) if self._intx_may else None)
        elif self.on_vector is not None:
            source.go((0, 0) if self._enabled and not self._silent else None)
        else:
            source.go(self._message(vector))

    @property
    def _intx_may(self) -> bool:
        return self.intx and not (self._enabled or self._msi or self._intx_disabled or self._silent)

    def _update_intx(self) -> None:
        out = self._sources != 0 and self._intx_may
        if self._port is not None and out != self._intx_out:
            self._intx_out = out
            self._port.set_intx(out)
