"""Finds what safe mode needs and the public interface does not name: syndrome and fault address.

Both are part of a saved context, whose layout differs from build to build. One data abort with a known
syndrome and address is caused, and looked for there.
"""

from __future__ import annotations

import ctypes
import functools
from typing import ClassVar

from unicorn import UC_HOOK_INTR
from unicorn.arm64_const import UC_ARM64_REG_CP_REG
from unicorn.unicorn_py3.unicorn import uclib

from qvm_emulator.cpu import Cpu
from qvm_emulator.scratch import scratch_memory, scratch_wiring
from qvmcore.api import CpuEntry, EngineError

_INTR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)

_BASE = 0x4000_0000
_SIZE = 0x1_0000
_TABLE = _BASE + 0x8000
_LOAD = 0xF940_0022  # ldr x2, [x1]
_ADDRESS = 0xC000_1238
_SYNDROME = 0x9600_0005  # data abort from the same level, translation fault at level 1
_BLOCK = 3 << 8 | 1 << 10 | 1  # a 1 GiB block: inner shareable, accessed, valid
_TCR_39_BIT = 0x8080_3519
_CONTEXT_LIMIT = 0x4000
_SCTLR_EL1, _TCR_EL1, _TTBR0_EL1 = (1, 0, 3, 0, 0), (2, 0, 3, 0, 2), (2, 0, 3, 0, 0)


class _ProbeCpu(Cpu):
    """Runs one faulting load and keeps the context saved in the exception hook."""

    mode: ClassVar[str] = "probe"

    def run(self) -> bool:
        context = ctypes.c_void_p()
        size = min(int(uclib.uc_context_size(self._handle)), _CONTEXT_LIMIT)
        uclib.uc_context_alloc(self._handle, ctypes.byref(context))
        self.saved = b""

        def on_exception(_uc: int, _number: int, _data: int) -> None:
            uclib.uc_context_save(self._handle, context)
            self.saved = ctypes.string_at(context.value or 0, size)
            uclib.uc_emu_stop(self._handle)

        self._hook(UC_HOOK_INTR, _INTR(on_exception))
        self._write_system(_TCR_EL1, _TCR_39_BIT)
        self._write_system(_TTBR0_EL1, _TABLE)
        self._write_system(_SCTLR_EL1, int(self.uc.reg_read(UC_ARM64_REG_CP_REG, _SCTLR_EL1)) | 1)
        self._start(1)
        uclib.uc_context_free(context)
        return False

    def set_irq(self, level: bool) -> None:
        """Not used."""

    def kick(self) -> None:
        """Not used."""


@functools.cache
def exception_offsets() -> tuple[int, int]:
    """Where in a saved context the syndrome (32 bits) and the fault address (64 bits) are.

    Found by causing one data abort whose syndrome and address are known. Raises EngineError.
    """
    memory = scratch_memory(_BASE, _SIZE)
    memory.write(_BASE, _LOAD.to_bytes(4, "little"))
    memory.write(_TABLE + 8, (_BASE | _BLOCK).to_bytes(8, "little"))
    cpu = _ProbeCpu(scratch_wiring(memory))
    cpu.enter(CpuEntry(_BASE, {"x1": _ADDRESS}))
    cpu.run()
    # The syndrome, four bytes of another field, the address: the way the core declares them.
    known = _SYNDROME.to_bytes(4, "little"), _ADDRESS.to_bytes(8, "little")
    for at in range(0, len(cpu.saved) - 16, 4):
        if cpu.saved[at : at + 4] == known[0] and cpu.saved[at + 8 : at + 16] == known[1]:
            return at, at + 8
    raise EngineError("safe mode does not know this Unicorn build: no fault address in its context")
