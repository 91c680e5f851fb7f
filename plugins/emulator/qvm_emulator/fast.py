"""Fast mode: traps, interrupts and cache maintenance inside the core, never leaving uc_emu_start.

Only used after :mod:`qvm_emulator.selftest` has shown that this build behaves as expected.
"""

from __future__ import annotations

import ctypes
from importlib import metadata
from typing import ClassVar

from unicorn import UC_HOOK_INTR, UC_HOOK_MEM_FETCH_UNMAPPED
from unicorn.unicorn_py3.unicorn import uclib

from qvm_emulator.cpu import PHYSICAL_SIZE, Cpu, Wiring
from qvm_emulator.internals import (
    CTR_EL0,
    CTR_LINE_MASK,
    CTR_PAGE_LINES,
    EXCEPTION_HVC,
    IC_IALLU,
    IC_IALLUIS,
    IC_IVAU,
    Internals,
    SystemRegister,
)
from qvm_emulator.timer import TimerChannel

_INTR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_FETCH = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)


class FastCpu(Cpu):
    """The CPU of fast mode. Raises Unsuitable when this build is not one whose insides are known."""

    mode: ClassVar[str] = "fast"

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        self.internals = Internals(self.uc, metadata.version("unicorn"), wiring.failed)
        self._flush = False
        self._kicked = False
        self._patch_caches()
        for timer, base in ((wiring.virtual_timer, "CNTV"), (wiring.physical_timer, "CNTP")):
            self._patch_timer(timer, base)
        self._hook_exceptions()
        self._skip_store_tracking()

    def run(self) -> bool:
        self._kicked = False
        self._start(0)
        if self._flush:
            self._flush = False
            self.uc.ctl_flush_tb()
            return False
        # Nothing but WFI and a kick ends a run without an error.
        return not self._kicked

    def set_irq(self, level: bool) -> None:
        if level:
            self.internals.raise_irq()
        else:
            self.internals.lower_irq()

    def kick(self) -> None:
        self._kicked = True
        uclib.uc_emu_stop(self._handle)

    def _patch_caches(self) -> None:
        """Make instruction-cache maintenance drop stale translations.

        The core notices a store to translated code through the mapping the code runs from, not through
        another one, and a kernel patches itself through another one. The architecture requires an IC
        operation before the new code may be relied on; that is the moment to forget the old.
        """
        inside = self.internals
        inside.patch_constant(CTR_EL0, CTR_LINE_MASK, CTR_PAGE_LINES)
        inside.patch_register(IC_IVAU, self._forget)
        for register in (IC_IALLU, IC_IALLUIS):
            inside.patch_register(register, self._forget_all)

    def _forget(self, virtual: int) -> None:
        physical = self.internals.physical_page(virtual)
        if physical is None:
            self._forget_all(virtual)
            return
        for start, end, host in self.ram:
            if start <= physical < end:
                self.internals.forget_page(host + physical - start)
                return

    def _forget_all(self, _value: int) -> None:
        """Leave the core at the end of this block (an IC operation ends one) and flush everything."""
        self._flush = True
        uclib.uc_emu_stop(self._handle)

    def _patch_timer(self, timer: TimerChannel, base: str) -> None:
        crm = 3 if base == "CNTV" else 2
        for suffix, op2, write, read in (
            ("TVAL", 0, timer.write_value, timer.read_value),
            ("CTL", 1, timer.write_control, timer.read_control),
            ("CVAL", 2, timer.write_compare, timer.read_compare),
        ):
            register = SystemRegister(f"{base}_{suffix}_EL0", 3, 3, 14, crm, op2)
            self.internals.patch_register(register, write, read)

    def _hook_exceptions(self) -> None:
        inside = self.internals

        def on_hvc(_uc: int, _number: int, _data: int) -> None:
            try:
                self._answer_hypercall()
            except BaseException as error:  # nothing may unwind into the core
                self.wiring.failed(error)

        def on_exception(uc: int, number: int, data: int) -> None:
            if number == EXCEPTION_HVC:
                on_hvc(uc, number, data)
            else:
                inside.deliver_exception()

        hypercall = _INTR(on_hvc)
        self._keep.append(hypercall)
        native = inside.native_intr_hook(ctypes.cast(hypercall, ctypes.c_void_p).value or 0)
        if native is None:
            self._hook(UC_HOOK_INTR, _INTR(on_exception))
        else:
            self._hook(UC_HOOK_INTR, ctypes.c_void_p(native[0]), data=native[1])

    def _skip_store_tracking(self) -> None:
        """Spare the core a scan of its whole TLB at every translation (15 % of a Linux boot).

        The scan lets it see stores to translated pages; we rely on IC operations. It is left out for
        addresses under a fetch hook. The hook itself is never called: every physical address is
        mapped. Virtual addresses that equal those of memory keep the scan, because for physical
        addresses such a hook would make every store slow; there live guests without an MMU.
        """

        def never(_uc: int, _kind: int, _address: int, _size: int, _value: int, _data: int) -> bool:
            return False

        self._hook(UC_HOOK_MEM_FETCH_UNMAPPED, _FETCH(never), PHYSICAL_SIZE, (1 << 64) - 1)
        if self.ram and self.ram[0][0] > 0:
            self._hook(UC_HOOK_MEM_FETCH_UNMAPPED, _FETCH(never), 0, self.ram[0][0] - 1)
