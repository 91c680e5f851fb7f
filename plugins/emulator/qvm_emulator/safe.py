"""Safe mode: the public Unicorn interface only. Several times slower, independent of the build.

The guest runs in slices of a fixed number of instructions, which end exactly. Exceptions are taken to
the guest's vector here; interrupts are delivered between slices; timer registers and cache
maintenance come through instruction hooks.

Known limit: exceptions from 32-bit (AArch32) user programs are not delivered.
"""

from __future__ import annotations

import ctypes
import threading
from typing import ClassVar

from unicorn import UC_HOOK_INSN, UC_HOOK_INTR, UC_PROT_EXEC
from unicorn.arm64_const import (
    UC_ARM64_INS_MSR,
    UC_ARM64_INS_SYS,
    UC_ARM64_REG_ELR_EL1,
    UC_ARM64_REG_ESR_EL1,
    UC_ARM64_REG_FAR_EL1,
    UC_ARM64_REG_PC,
    UC_ARM64_REG_PSTATE,
    UC_ARM64_REG_SP,
    UC_ARM64_REG_SP_EL0,
    UC_ARM64_REG_SP_EL1,
    UC_ARM64_REG_VBAR_EL1,
)
from unicorn.unicorn_py3.unicorn import uclib

from qvm_emulator.cpu import PSTATE_START, SPSR_EL1, Cpu, Wiring
from qvm_emulator.probe import exception_offsets
from qvm_emulator.timer import TimerChannel
from qvmcore.api import EngineError

_SLICE = 100_000  # about 0.5 ms
# While an interrupt waits for the guest to unmask, a slice has to end where it is unmasked, which may
# be for two instructions only. Guests unmask soon after WFI; a longer wait may cost precision.
_MASKED_FIRST, _MASKED_GROWTH, _MASKED_LONGEST = 2, 16, 500
_MASKED_SPREAD = 7919  # a prime: lengths that do not keep step with a loop of the guest
#: Instructions of the shortest loop that could store code, call it and invalidate: 5. A maintenance
#: operation among the first 4 after a flush therefore follows another one directly.
_SLICE_AFTER_FLUSH = 4
_LINE = 64

_WFI = 0xD503207F
_IRQ_MASKED = 1 << 7
_VECTOR_IRQ = 0x80
_EXCEPTION_PREFETCH_ABORT, _EXCEPTION_DATA_ABORT, _EXCEPTION_HVC = 3, 4, 11
_FIRST_SLEEP_NS, _LONGEST_SLEEP_NS = 1_000_000, 50_000_000

_INTR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)


class _SystemAccess(ctypes.Structure):
    """What a system instruction hook is given: the encoding and the value written."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("crn", "crm", "op0", "op1", "op2")] + [
        ("value", ctypes.c_uint64)
    ]


_SYSTEM = ctypes.CFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_SystemAccess), ctypes.c_void_p
)


class SafeCpu(Cpu):
    """The CPU of safe mode."""

    mode: ClassVar[str] = "safe"

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        self.sleep_limit = _FIRST_SLEEP_NS
        self._irq = False
        self._flush = False  # everything translated must be forgotten before the next instruction
        self._after_flush = False  # this slice is the first few instructions after that
        self._in_loop = False  # ... and it met another maintenance operation
        self._slept_at = 0  # pc behind the last WFI
        self._thread = 0
        self._kicked = False
        self._masked = 0  # slices since an interrupt began to wait for being unmasked
        self._timers = {
            (crm, op2): handler
            for crm, timer in ((3, wiring.virtual_timer), (2, wiring.physical_timer))
            for op2, handler in enumerate((timer.write_value, timer.write_control, timer.write_compare))
        }
        self._context = ctypes.c_void_p()
        if uclib.uc_context_alloc(self.uc._uch, ctypes.byref(self._context)):
            raise EngineError("Unicorn cannot allocate a context")
        syndrome, address = exception_offsets()
        base = self._context.value or 0
        self._syndrome = ctypes.c_uint32.from_address(base + syndrome)
        self._address = ctypes.c_uint64.from_address(base + address)
        self._hook(UC_HOOK_INTR, _INTR(self._on_exception))
        self._hook(UC_HOOK_INSN, _SYSTEM(self._on_msr), 1, 0, ctypes.c_int(UC_ARM64_INS_MSR))
        self._hook(UC_HOOK_INSN, _SYSTEM(self._on_sys), 1, 0, ctypes.c_int(UC_ARM64_INS_SYS))

    def run(self) -> bool:
        self._thread = threading.get_ident()
        self._kicked = False
        for crm, timer in ((3, self.wiring.virtual_timer), (2, self.wiring.physical_timer)):
            self._show_timer(crm, timer)
        count = _SLICE
        if self._irq:
            pstate = int(self.uc.reg_read(UC_ARM64_REG_PSTATE))
            if pstate & _IRQ_MASKED:
                count = self._masked_slice()
            else:
                self._masked = 0
                self.pc = self._vector(_VECTOR_IRQ, pstate, self.pc)
        self._after_flush = False
        self._start(count)
        while self._flush:
            self._flush = False
            self.uc.ctl_flush_tb()
            self._repeat_after_flush()
        return self._at_wfi()

    def _masked_slice(self) -> int:
        self._masked += 1
        base = min(_MASKED_FIRST + self._masked // _MASKED_GROWTH, _MASKED_LONGEST)
        return base if base == _MASKED_FIRST else base + self._masked * _MASKED_SPREAD % base

    def set_irq(self, level: bool) -> None:
        self._irq = level
        if level:
            self.sleep_limit = _FIRST_SLEEP_NS

    def kick(self) -> None:
        # From another thread a stop would not be exact; a slice ends soon enough, or the next
        # exception does when the guest executes nothing but exceptions.
        self._kicked = True
        if threading.get_ident() == self._thread:
            uclib.uc_emu_stop(self._handle)

    # ---- exceptions ----------------------------------------------------------------------------

    def _on_exception(self, _uc: int, number: int, _data: int) -> None:
        try:
            if self._kicked or self._irq:
                # Exceptions are slow here: a slice full of them would keep an interrupt waiting.
                uclib.uc_emu_stop(self._handle)
            if number == _EXCEPTION_HVC:
                self._answer_hypercall()
                return
            uclib.uc_context_save(self._handle, self._context)
            self.uc.reg_write(UC_ARM64_REG_ESR_EL1, self._syndrome.value)
            if number in (_EXCEPTION_PREFETCH_ABORT, _EXCEPTION_DATA_ABORT):
                self.uc.reg_write(UC_ARM64_REG_FAR_EL1, self._address.value)
            pstate = int(self.uc.reg_read(UC_ARM64_REG_PSTATE))
            pc = int(self.uc.reg_read(UC_ARM64_REG_PC))
            self.uc.reg_write(UC_ARM64_REG_PC, self._vector(0, pstate, pc))
        except BaseException as error:  # nothing may unwind into the core
            self.wiring.failed(error)

    def _vector(self, kind: int, pstate: int, pc: int) -> int:
        """Enter EL1 for an exception of ``kind`` taken at ``pc``; gives the address of the vector."""
        write, read = self.uc.reg_write, self.uc.reg_read
        if pstate & 0xC == 0 or not pstate & 1:  # from EL0, or from EL1 on the EL0 stack pointer
            offset = 0x400 if pstate & 0xC == 0 else 0
            write(UC_ARM64_REG_SP_EL0, read(UC_ARM64_REG_SP))
            write(UC_ARM64_REG_SP, read(UC_ARM64_REG_SP_EL1))
        else:
            offset = 0x200
        write(UC_ARM64_REG_ELR_EL1, pc)
        write(UC_ARM64_REG_PSTATE, PSTATE_START)
        self._write_system(SPSR_EL1, pstate & 0xFFFF_FFFF)
        return int(read(UC_ARM64_REG_VBAR_EL1)) + offset + kind

    # ---- system instructions -------------------------------------------------------------------

    def _on_msr(self, _uc: int, _register: int, access: ctypes._Pointer[_SystemAccess], _data: int) -> int:
        """A write of a system register; 1 = done here."""
        it = access.contents
        if it.crn != 14 or it.op0 != 3 or it.op1 != 3:
            return 0
        handler = self._timers.get((it.crm, it.op2))
        if handler is None:
            return 0
        try:
            handler(it.value)
            timer = self.wiring.virtual_timer if it.crm == 3 else self.wiring.physical_timer
            self._show_timer(it.crm, timer)
        except BaseException as error:  # nothing may unwind into the core
            self.wiring.failed(error)
        return 1

    def _show_timer(self, crm: int, timer: TimerChannel) -> None:
        """Store what the guest reads back: the core computes TVAL from CVAL, CTL is ours."""
        self._write_system((14, crm, 3, 3, 2), timer.read_compare())
        self._write_system((14, crm, 3, 3, 1), timer.read_control())

    def _on_sys(self, _uc: int, _register: int, access: ctypes._Pointer[_SystemAccess], _data: int) -> int:
        """Cache and TLB maintenance; 0 = the core goes on with it."""
        it = access.contents
        if it.crn != 7 or it.crm not in (1, 5):
            return 0
        try:
            if it.op1 == 3 and it.op2 == 1 and self._forget_line(it.value):
                return 0
            if not self._after_flush:
                self._flush = True
            self._in_loop = True
            uclib.uc_emu_stop(self._handle)
        except BaseException as error:  # nothing may unwind into the core
            self.wiring.failed(error)
        return 0

    def _forget_line(self, virtual: int) -> bool:
        """Drop the translations of one line when it is executable at this address."""
        start = virtual & -_LINE
        physical = ctypes.c_uint64()
        if uclib.uc_vmem_translate(
            self._handle, ctypes.c_uint64(start), UC_PROT_EXEC, ctypes.byref(physical)
        ):
            return False
        self.uc.ctl_remove_cache(start, start + _LINE)
        return True

    def _repeat_after_flush(self) -> None:
        """Step over further maintenance operations of the same loop without flushing for each.

        Nothing but the loop itself can have been translated since the flush.
        """
        self._after_flush = True
        while True:
            self._in_loop = False
            self._start(_SLICE_AFTER_FLUSH)
            if not self._in_loop:
                break
        self._after_flush = False

    # ---- WFI -----------------------------------------------------------------------------------

    def _at_wfi(self) -> bool:
        """Whether the slice ended behind a WFI.

        The interface does not tell WFI from the end of a slice. A slice that happens to end at a
        branch target behind a WFI sleeps, too; the sleep is therefore short and grows only while
        nothing but WFI is seen. Leaving WFI early is always allowed.
        """
        if self._word_before(self.pc) != _WFI:
            self.sleep_limit = _FIRST_SLEEP_NS
            return False
        if self.pc == self._slept_at:
            self.sleep_limit = min(2 * self.sleep_limit, _LONGEST_SLEEP_NS)
        self._slept_at = self.pc
        return True

    def _word_before(self, pc: int) -> int:
        physical = ctypes.c_uint64()
        if uclib.uc_vmem_translate(
            self._handle,
            ctypes.c_uint64((pc - 4) & (1 << 64) - 1),
            UC_PROT_EXEC,
            ctypes.byref(physical),
        ):
            return 0
        for start, end, host in self.ram:
            if start <= physical.value < end - 3:
                return ctypes.c_uint32.from_address(host + physical.value - start).value
        return 0
