"""A GICv2 for one CPU: distributor and CPU interface, without security extensions.

State is kept as Python integers used as bit sets, bit n = INTID n, so that "is anything deliverable"
costs a few integer operations however many lines there are.

Lines are driven from any thread; registers are accessed on the vCPU thread. One lock guards both. The
output is the CPU's IRQ input: ``output(level)`` is called with the lock held, on every change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

SPURIOUS = 1023
MAX_LINES = 1020
SGIS = 0xFFFF
_IDLE = 0x100  # running priority when nothing is active: lower than every real priority
_NOTHING = (SPURIOUS, _IDLE)

# Distributor registers (offsets in bytes; GIC architecture specification 2.0, chapter 4.3)
GICD_CTLR, GICD_TYPER, GICD_IIDR = 0x000, 0x004, 0x008
GICD_ISENABLER = 0x100  # up to GICD_IPRIORITYR: set and clear banks for enable, pending, active
GICD_IPRIORITYR, GICD_ITARGETSR = 0x400, 0x800  # targets read as zero with one CPU
GICD_ICFGR, GICD_SGIR = 0xC00, 0xF00
GICD_CPENDSGIR, GICD_SPENDSGIR = 0xF10, 0xF20
GICD_ICPIDR2 = 0xFE8

# CPU interface registers (chapter 4.4)
GICC_CTLR, GICC_PMR, GICC_BPR, GICC_IAR, GICC_EOIR = 0x00, 0x04, 0x08, 0x0C, 0x10
GICC_RPR, GICC_HPPIR, GICC_IIDR, GICC_DIR = 0x14, 0x18, 0xFC, 0x1000

_EOIMODE = 1 << 9
_CTLR_MASK = 1 | _EOIMODE
_IMPLEMENTER = 0x43B  # ARM's JEP106 code, as a GIC-400 reports


def _discard(_level: bool) -> None:
    """The output before a CPU is connected."""


class GicV2:
    """The interrupt controller; ``lines`` is the number of INTIDs including the 32 private ones."""

    def __init__(self, lines: int, output: Callable[[bool], None] = _discard) -> None:
        if not 32 < lines <= MAX_LINES:
            raise ValueError(f"a GICv2 has 33 to {MAX_LINES} interrupt lines, not {lines}")
        self.lines = lines
        self.lock = threading.Lock()
        self.output = output
        self.delivered = 0
        words = (lines + 31) // 32
        self._typer = words - 1
        self._all = (1 << lines) - 1
        self._ctlr = 0
        self._enabled = SGIS  # SGIs are always enabled in this implementation
        self._latched = 0  # edges, SGIs, and what software or pulse() made pending
        self._level = 0  # input lines that are high now
        self._edge = SGIS  # configured edge-triggered
        self._active = 0
        self._priority = bytearray(32 * words)
        self._by_priority: list[tuple[int, int]] = [(0, self._all)]
        self._gicc_ctlr = 0
        self._pmr = 0
        self._bpr = 0
        self._running: list[int] = []  # group priorities of the active interrupts, innermost last
        self._asserted = False

    # ---- lines: any thread -------------------------------------------------------------------

    def set_line(self, intid: int, level: bool) -> None:
        """Drive the input of ``intid``. A rising edge is latched when the line is edge-triggered."""
        bit = 1 << intid
        with self.lock:
            if bool(self._level & bit) == level:
                return
            if level:
                self._level |= bit
                if self._edge & bit:
                    self._latched |= bit
            else:
                self._level &= ~bit
            self._update()

    def pulse(self, intid: int) -> None:
        """Make ``intid`` pending once, however the line is configured: a pulse is never lost."""
        with self.lock:
            self._latched |= 1 << intid
            self._update()

    @property
    def asserted(self) -> bool:
        """Whether the IRQ input of the CPU is high."""
        return self._asserted

    # ---- selection: lock held ----------------------------------------------------------------

    def _pending(self) -> int:
        return self._latched | (self._level & ~self._edge)

    def _candidate(self) -> tuple[int, int]:
        """Best deliverable (INTID, priority), or (1023, idle). PMR and running priority are not applied."""
        if self._ctlr & 1:
            ready = (self._latched | self._level & ~self._edge) & self._enabled & ~self._active
            if ready:
                for priority, members in self._by_priority:
                    hit = ready & members
                    if hit:
                        return (hit & -hit).bit_length() - 1, priority
        return _NOTHING

    def _group(self, priority: int) -> int:
        """The part of a priority that decides preemption, per the binary point register."""
        return priority & (0xFF << (self._bpr + 1)) & 0xFF

    def _deliverable(self) -> tuple[int, int]:
        best = self._candidate()
        priority = best[1]
        if priority >= self._pmr or not self._gicc_ctlr & 1:
            return _NOTHING
        if self._running and self._group(priority) >= self._running[-1]:
            return _NOTHING
        return best

    def _update(self) -> None:
        level = self._deliverable() is not _NOTHING
        if level != self._asserted:
            self._asserted = level
            self.output(level)

    # ---- CPU interface: vCPU thread ----------------------------------------------------------

    def acknowledge(self) -> int:
        """Read of GICC_IAR: the best pending interrupt becomes active."""
        with self.lock:
            # Nothing is deliverable while the output is low: a guest that reads until there is nothing
            # more does so once for every interrupt.
            intid, priority = self._deliverable() if self._asserted else _NOTHING
            if intid == SPURIOUS:
                # The CPU may still hold an older request; drop it whatever we believe.
                self._asserted = False
                self.output(False)
                return SPURIOUS
            bit = 1 << intid
            self._active |= bit
            self._latched &= ~bit
            self._running.append(self._group(priority))
            self.delivered += 1
            self._update()
            return intid

    def end_of_interrupt(self, value: int) -> None:
        """Write of GICC_EOIR: drop the running priority and, with EOImode 0, deactivate."""
        intid = value & 0x3FF
        if intid >= self.lines:
            return
        with self.lock:
            if self._running:
                self._running.pop()
            if not self._gicc_ctlr & _EOIMODE:
                self._active &= ~(1 << intid)
            self._update()

    def deactivate(self, value: int) -> None:
        """Write of GICC_DIR: deactivate; only meaningful with EOImode 1."""
        intid = value & 0x3FF
        if intid >= self.lines or not self._gicc_ctlr & _EOIMODE:
            return
        with self.lock:
            self._active &= ~(1 << intid)
            self._update()

    def cpu_read(self, offset: int, size: int) -> int:
        """Register read in the CPU interface window."""
        if offset == GICC_IAR:
            return self.acknowledge()
        if offset == GICC_CTLR:
            return self._gicc_ctlr
        if offset == GICC_PMR:
            return self._pmr
        if offset == GICC_BPR:
            return self._bpr
        if offset == GICC_RPR:
            return self._running[-1] if self._running else 0xFF
        if offset == GICC_HPPIR:
            with self.lock:
                return self._candidate()[0]
        if offset == GICC_IIDR:
            return 0x0202_0000 | _IMPLEMENTER
        return 0

    def cpu_write(self, offset: int, size: int, value: int) -> None:
        """Register write in the CPU interface window."""
        if offset == GICC_EOIR:
            self.end_of_interrupt(value)
            return
        if offset == GICC_DIR:
            self.deactivate(value)
            return
        with self.lock:
            if offset == GICC_CTLR:
                self._gicc_ctlr = value & _CTLR_MASK
            elif offset == GICC_PMR:
                self._pmr = value & 0xFF
            elif offset == GICC_BPR:
                self._bpr = value & 7
            else:
                return
            self._update()

    # ---- distributor: vCPU thread ------------------------------------------------------------

    def dist_read(self, offset: int, size: int) -> int:
        """Register read in the distributor window."""
        with self.lock:
            if offset == GICD_CTLR:
                return self._ctlr
            if offset == GICD_TYPER:
                return self._typer
            if offset == GICD_IIDR:
                return _IMPLEMENTER
            if GICD_ISENABLER <= offset < GICD_IPRIORITYR:
                bits = (self._enabled, self._pending(), self._active)[(offset >> 8) - 1]
                return (bits >> ((offset & 0x7F) * 8)) & ((1 << (8 * size)) - 1)
            if GICD_IPRIORITYR <= offset < GICD_ITARGETSR:
                return _bytes_at(self._priority, offset - GICD_IPRIORITYR, size)
            if GICD_ICFGR <= offset < GICD_SGIR:
                return self._read_config(offset - GICD_ICFGR, size)
            if GICD_CPENDSGIR <= offset < GICD_SPENDSGIR + 16:
                first = (offset - GICD_CPENDSGIR) & 0xF
                return sum(((self._latched >> (first + i)) & 1) << (8 * i) for i in range(size))
            if offset == GICD_ICPIDR2:
                return 0x2B  # architecture version 2
            return 0

    def dist_write(self, offset: int, size: int, value: int) -> None:
        """Register write in the distributor window."""
        with self.lock:
            if offset == GICD_CTLR:
                self._ctlr = value & 1
            elif GICD_ISENABLER <= offset < GICD_IPRIORITYR:
                self._write_bits(offset, (value << ((offset & 0x7F) * 8)) & self._all)
            elif GICD_IPRIORITYR <= offset < GICD_ITARGETSR:
                if _store(self._priority, offset - GICD_IPRIORITYR, size, value):
                    self._sort_priorities()
            elif GICD_ICFGR <= offset < GICD_SGIR:
                self._write_config(offset - GICD_ICFGR, size, value)
            elif offset == GICD_SGIR:
                # One CPU: the list names CPU 0 or not, "all but me" is nobody, "me" is me.
                who = (value >> 24) & 3
                if who == 2 or (who == 0 and value & (1 << 16)):
                    self._latched |= 1 << (value & 0xF)
            elif GICD_CPENDSGIR <= offset < GICD_SPENDSGIR + 16:
                first = (offset - GICD_CPENDSGIR) & 0xF
                mask = sum(1 << (first + i) for i in range(size) if (value >> (8 * i)) & 0xFF)
                if offset < GICD_SPENDSGIR:
                    self._latched &= ~mask
                else:
                    self._latched |= mask & SGIS
            else:
                return
            self._update()

    def _write_bits(self, offset: int, bits: int) -> None:
        """The set and clear registers for enable, pending and active."""
        clear = bool(offset & 0x80)
        bank = offset >> 8
        if bank == 1:
            self._enabled = (self._enabled & ~bits if clear else self._enabled | bits) | SGIS
        elif bank == 2:
            bits &= ~SGIS  # SGIs have their own registers
            self._latched = self._latched & ~bits if clear else self._latched | bits
        else:
            self._active = self._active & ~bits if clear else self._active | bits

    def _sort_priorities(self) -> None:
        table: dict[int, int] = {}
        for intid in range(self.lines):
            priority = self._priority[intid]
            table[priority] = table.get(priority, 0) | (1 << intid)
        self._by_priority = sorted(table.items())

    def _read_config(self, first: int, size: int) -> int:
        return sum(2 << (2 * i) for i in range(4 * size) if self._edge >> (4 * first + i) & 1)

    def _write_config(self, first: int, size: int, value: int) -> None:
        for i in range(4 * size):
            intid = 4 * first + i
            if intid >= 16:
                if value >> (2 * i) & 2:
                    self._edge |= 1 << intid
                else:
                    self._edge &= ~(1 << intid)


def _bytes_at(table: bytearray, first: int, size: int) -> int:
    return int.from_bytes(table[first : first + size], "little")


def _store(table: bytearray, first: int, size: int, value: int) -> bool:
    """Write ``size`` bytes; True when something inside the table changed."""
    size = min(size, len(table) - first)
    if size <= 0:
        return False
    new = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    if table[first : first + size] == new:
        return False
    table[first : first + size] = new
    return True
