"""Interrupts of one PCI function (floor 4): MSI-X with mask and pending bits, or INTx.

MSI-X: PCI 3.0, 6.8.2. INTx: PCI 3.0, 2.2.6; one level line, ``INTA#``, for all sources.

The object exists before its function, so that a vdev may signal from ``on_configured``. Everything
here is safe from any thread; the lock is held while a message is sent, so messages of one vector
keep their order with mask writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from qvmcore.pci import spec

_MASKED = 1
_WORD = 0xFFFFFFFF


class InterruptPort(Protocol):
    """Where interrupts of a function go; any thread, must not block."""

    def message(self, address: int, data: int) -> None:
        """A message-signalled interrupt: ``data`` (32 bits) written to ``address``."""

    def set_intx(self, level: bool) -> None:
        """Drive ``INTA#``; only called on changes."""

    def pulse_intx(self) -> None:
        """Signal ``INTA#`` once, so that it is not lost; the line is low before and after."""


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
        self._lock = threading.Lock()
        self._port: InterruptPort | None = None
        self.resize(vectors)
        self._pending = 0
        self._enabled = self._function_mask = False
        self._bus_master = False
        self._sources = 0  # levels of the lines, bit = line number
        self._intx_disabled = False
        self._intx_out = False

    def resize(self, vectors: int) -> None:
        """Another number of vectors, before the function is made. Raises ValueError."""
        if not 0 <= vectors <= spec.MSIX_MAX_VECTORS:
            raise ValueError(f"{vectors} MSI-X vectors; expected 0 to {spec.MSIX_MAX_VECTORS}")
        self.vectors = vectors
        self._table = [[0, 0, 0, _MASKED] for _ in range(vectors)]

    # ---- for devices and transports ----------------------------------------------------------

    @property
    def msix_enabled(self) -> bool:
        """Whether the guest switched to MSI-X; INTx is silent then. Any thread."""
        return self._enabled

    @property
    def level(self) -> bool:
        """Whether the device asks for INTx now: the Interrupt Status bit."""
        return self._sources != 0

    def signal(self, vector: int) -> None:
        """Send the message of ``vector``, or remember it while it is masked.

        Nothing happens for a vector that does not exist (virtio's NO_VECTOR) or while MSI-X is
        disabled. A function that may not master the bus cannot send: the vector stays pending.
        """
        if not 0 <= vector < self.vectors:
            return
        if self.on_vector is not None:
            if self._enabled:
                self.on_vector(vector)
            return
        with self._lock:
            if self._enabled:
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

    # ---- for the function ----------------------------------------------------------------------

    def connect(self, port: InterruptPort) -> None:
        """Where messages and INTx go; before the guest starts."""
        with self._lock:
            self._port = port
            self._update_intx()

    def set_command(self, command: int) -> None:
        """The Command register changed: Bus Master and INTx Disable."""
        with self._lock:
            self._bus_master = bool(command & spec.COMMAND_BUS_MASTER)
            self._intx_disabled = bool(command & spec.COMMAND_INTX_DISABLE)
            self._update_intx()
            self._deliver(self._pending)

    def set_control(self, control: int) -> None:
        """The MSI-X Message Control register changed: Enable and Function Mask."""
        with self._lock:
            was_enabled, self._enabled = self._enabled, bool(control & spec.MSIX_ENABLE)
            self._function_mask = bool(control & spec.MSIX_FUNCTION_MASK)
            if not self._enabled:
                self._pending = 0
            self._update_intx()
            self._deliver(self._pending)
        if was_enabled != self._enabled:
            self.on_msix(self._enabled)

    def reset(self) -> None:
        """As after power-on; the levels of the sources stay, they are the device's."""
        with self._lock:
            was_enabled = self._enabled
            for row in self._table:
                row[:] = [0, 0, 0, _MASKED]
            self._pending = 0
            self._enabled = self._function_mask = self._bus_master = self._intx_disabled = False
            self._update_intx()
        if was_enabled:
            self.on_msix(False)

    @property
    def pba_offset(self) -> int:
        """Where the pending bits start in the MSI-X BAR: directly behind the table."""
        return self.vectors * spec.MSIX_ENTRY_SIZE

    @property
    def bar_size(self) -> int:
        """Bytes of the MSI-X BAR: table and pending bits, at least one page."""
        need = self.pba_offset + (self.vectors + 63) // 64 * 8
        return max(4096, 1 << (need - 1).bit_length())

    def table_read(self, offset: int, size: int) -> int:
        """The MSI-X BAR: aligned reads of 4 and 8 bytes; anything else gives 0."""
        if size not in (4, 8) or offset % size:
            return 0
        return sum(self._word(offset + 4 * i) << (32 * i) for i in range(size // 4))

    def table_write(self, offset: int, size: int, value: int) -> None:
        """The MSI-X BAR: aligned writes of 4 and 8 bytes to the table; pending bits are read-only."""
        if size not in (4, 8) or offset % size:
            return
        with self._lock:
            for i in range(size // 4):
                self._store(offset + 4 * i, value >> (32 * i) & _WORD)

    # ---- inside ----------------------------------------------------------------------------------

    def _word(self, offset: int) -> int:
        if offset < self.pba_offset:
            return self._table[offset // spec.MSIX_ENTRY_SIZE][offset % spec.MSIX_ENTRY_SIZE // 4]
        return self._pending >> (8 * (offset - self.pba_offset)) & _WORD

    def _store(self, offset: int, value: int) -> None:
        if offset >= self.pba_offset:
            return
        vector, field = offset // spec.MSIX_ENTRY_SIZE, offset % spec.MSIX_ENTRY_SIZE // 4
        # Address bits 1:0 and the reserved bits of Vector Control are zero (6.8.2.7, 6.8.2.9).
        self._table[vector][field] = value & (~3 & _WORD, _WORD, _WORD, _MASKED)[field]
        if field == 3:
            self._deliver(self._pending & 1 << vector)

    def _deliver(self, wanted: int) -> None:
        if not wanted or not self._enabled or self._function_mask or not self._bus_master:
            return
        port = self._port
        while wanted and port is not None:
            vector = (wanted & -wanted).bit_length() - 1
            wanted &= wanted - 1
            low, high, data, control = self._table[vector]
            if not control & _MASKED:
                self._pending &= ~(1 << vector)
                port.message(high << 32 | low, data)

    @property
    def _intx_may(self) -> bool:
        return self.intx and not self._enabled and not self._intx_disabled

    def _update_intx(self) -> None:
        out = self._sources != 0 and self._intx_may
        if self._port is not None and out != self._intx_out:
            self._intx_out = out
            self._port.set_intx(out)


class FunctionLine:
    """One interrupt source of a function as a plain line: MSI-X message or INTx level, as enabled."""

    def __init__(self, interrupts: PciInterrupts, index: int) -> None:
        self._interrupts = interrupts
        self._index = index
        self._level = False

    def pulse(self) -> None:
        """One message, or one pulse of ``INTA#``."""
        if self._interrupts.msix_enabled:
            self._interrupts.signal(self._index)
        else:
            self._interrupts.pulse_intx()

    def set(self, level: bool) -> None:
        """A rising edge sends the message; INTx follows the level."""
        rising, self._level = level and not self._level, level
        self._interrupts.set_intx(level, self._index)
        if rising:
            self._interrupts.signal(self._index)
