"""The Unicorn CPU both modes share: memory map, start state, registers, and what ends a run.

A :class:`Cpu` is created, run and read on the vCPU thread, except for what says "any thread".
"""

from __future__ import annotations

import abc
import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unicorn import (
    UC_ARCH_ARM64,
    UC_HOOK_MEM_FETCH_PROT,
    UC_HOOK_MEM_WRITE_PROT,
    UC_MODE_ARM,
    UC_PROT_ALL,
    UC_PROT_EXEC,
    UC_PROT_READ,
)
from unicorn.arm64_const import (
    UC_ARM64_REG_CP_REG,
    UC_ARM64_REG_PC,
    UC_ARM64_REG_PSTATE,
    UC_ARM64_REG_SP,
    UC_ARM64_REG_X0,
    UC_ARM64_REG_X29,
    UC_ARM64_REG_X30,
    UC_CPU_ARM64_A72,
)
from unicorn.unicorn_py3.unicorn import Uc, UcError, uclib

from qvm_emulator.timer import FREQUENCY, NEVER, TimerChannel
from qvmcore.api import CpuEntry, EngineError, GuestMemory

log = logging.getLogger(__name__)

#: The physical address space of a Cortex-A72 is 44 bits.
PHYSICAL_SIZE = 1 << 44
PAGE = 4096

#: Host memory for translated code; when it is full, all of it is dropped. A Linux boot uses some 50 MiB.
_CODE_BUFFER = 256 << 20

ReadHandler = Callable[[int, int], int]
WriteHandler = Callable[[int, int, int], None]

_MMIO_READ = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
)
_MMIO_WRITE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
)
_MEM_EVENT = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)

# System registers as (crn, crm, op0, op1, op2), the order of Unicorn's CP_REG.
SCR_EL3 = (1, 1, 3, 6, 0)
HCR_EL2 = (1, 1, 3, 4, 0)
CNTHCTL_EL2 = (14, 1, 3, 4, 0)
CNTFRQ_EL0 = (14, 0, 3, 3, 0)
SPSR_EL1 = (4, 0, 3, 0, 0)

# SCR_EL3: NS, the two RES1 bits, SMD (SMC is undefined: PSCI is by HVC), HCE, RW. HCR_EL2: RW.
_SCR_VALUE = 1 | 0x30 | 1 << 7 | 1 << 8 | 1 << 10
_HCR_VALUE = 1 << 31
_CNTHCTL_VALUE = 3  # EL1 may use the physical counter and timer
#: EL1 with its own stack pointer, all interrupts masked.
PSTATE_START = 0x3C5


@dataclass(frozen=True, slots=True)
class Window:
    """A physical range answered by two handlers that get the offset inside it."""

    base: int
    size: int
    read: ReadHandler
    write: WriteHandler


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a CPU is connected to.

    ``windows`` lie outside memory and do not overlap; what neither they nor memory cover goes to
    ``bus_read(address, size)`` and ``bus_write(address, size, value)``. ``hypercall(function, argument)``
    answers HVC. ``failed(error)`` is told about an exception out of a handler.
    """

    memory: GuestMemory
    windows: tuple[Window, ...]
    bus_read: ReadHandler
    bus_write: WriteHandler
    hypercall: Callable[[int, int], int]
    virtual_timer: TimerChannel
    physical_timer: TimerChannel
    failed: Callable[[BaseException], None]


class Cpu(abc.ABC):
    """One aarch64 CPU at EL1."""

    mode: ClassVar[str]

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._keep: list[object] = []
        #: (start, end, host address) of every memory region.
        self.ram = tuple((r.start, r.end, r.host_address) for r in wiring.memory.regions)
        self.hypercalls = 0
        self.pc = 0
        #: The longest one WFI may sleep, in ns; NEVER when the mode knows a WFI for sure.
        self.sleep_limit = NEVER
        try:
            make: Any = Uc  # the binding has no types
            self.uc: Any = make(UC_ARCH_ARM64, UC_MODE_ARM)
            self.uc.ctl_set_cpu_model(UC_CPU_ARM64_A72)
            self.uc.ctl_set_tcg_buffer_size(_CODE_BUFFER)
            self.uc.ctl_exits_enabled(True)  # the empty set of exits: no address ends a run
            self._map()
            self.uc.reg_write(UC_ARM64_REG_X0, 0)  # builds the CPU object
            self._write_system(SCR_EL3, _SCR_VALUE)
            self._write_system(HCR_EL2, _HCR_VALUE)
            self._write_system(CNTHCTL_EL2, _CNTHCTL_VALUE)
            self._write_system(CNTFRQ_EL0, FREQUENCY)
        except UcError as error:
            raise EngineError(f"Unicorn cannot build the CPU: {error}") from error
        self._handle = self.uc._uch

    # ---- the vCPU thread -----------------------------------------------------------------------

    def enter(self, entry: CpuEntry) -> None:
        """Set the registers of the first instruction. Raises EngineError for an unknown register."""
        self.uc.reg_write(UC_ARM64_REG_PSTATE, PSTATE_START)
        for name, value in entry.registers.items():
            self.uc.reg_write(_general_register(name), value)
        # Any system register write rebuilds what the core derives from PSTATE.
        self._write_system(HCR_EL2, _HCR_VALUE)
        self.pc = entry.pc

    @abc.abstractmethod
    def run(self) -> bool:
        """Run until WFI (True), or until a kick or a time slice ended (False).

        Raises EngineError when the core gives up.
        """

    def registers(self) -> Mapping[str, int]:
        """x0..x30, sp, pc and pstate; only while the CPU is not running. Empty once closed."""
        if self.uc is None:
            return {}
        values = {f"x{n}": int(self.uc.reg_read(_general_register(f"x{n}"))) for n in range(31)}
        values["sp"] = int(self.uc.reg_read(UC_ARM64_REG_SP))
        values["pc"] = int(self.uc.reg_read(UC_ARM64_REG_PC))
        values["pstate"] = int(self.uc.reg_read(UC_ARM64_REG_PSTATE))
        return values

    def close(self) -> None:
        """Free the core, only while the CPU is not running; idempotent. No registers afterwards."""
        self.uc = None  # the last reference: the binding closes the engine at once
        self._keep.clear()

    # ---- any thread ----------------------------------------------------------------------------

    @abc.abstractmethod
    def set_irq(self, level: bool) -> None:
        """Drive the IRQ input. A request may be lost in a race: repeat it until acknowledged."""

    @abc.abstractmethod
    def kick(self) -> None:
        """Make :meth:`run` return soon. Without effect while it is not running: repeat."""

    # ---- shared helpers ------------------------------------------------------------------------

    def _start(self, count: int) -> None:
        """One uc_emu_start from ``self.pc``; the GIL is released while the guest runs."""
        error = int(
            uclib.uc_emu_start(
                self._handle,
                ctypes.c_uint64(self.pc),
                ctypes.c_uint64(0),
                ctypes.c_uint64(0),
                ctypes.c_size_t(count),
            )
        )
        self.pc = int(self.uc.reg_read(UC_ARM64_REG_PC))
        if error:
            raise EngineError(f"the emulated CPU stopped at pc {self.pc:#x}: {_explain(error)}")

    def _answer_hypercall(self) -> None:
        self.hypercalls += 1
        function = int(self.uc.reg_read(UC_ARM64_REG_X0))
        argument = int(self.uc.reg_read(_general_register("x1")))
        self.uc.reg_write(UC_ARM64_REG_X0, self.wiring.hypercall(function, argument))

    def _write_system(self, register: tuple[int, int, int, int, int], value: int) -> None:
        self.uc.reg_write(UC_ARM64_REG_CP_REG, (*register, value))

    def _hook(
        self, kind: int, callback: Any, begin: int = 1, end: int = 0, *extra: object, data: int | None = None
    ) -> None:
        """Add a hook by raw pointer; begin > end means everywhere."""
        handle = ctypes.c_size_t()
        error = uclib.uc_hook_add(
            self.uc._uch,
            ctypes.byref(handle),
            kind,
            callback,
            ctypes.c_void_p(data),
            ctypes.c_uint64(begin),
            ctypes.c_uint64(end),
            *extra,
        )
        if error:
            raise EngineError(f"Unicorn refuses a hook: {_explain(error)}")
        self._keep.append(callback)

    def _map(self) -> None:
        """Memory by pointer, the windows, and the bus everywhere else."""
        taken: list[tuple[int, int]] = []
        for region, (start, end, host) in zip(self.wiring.memory.regions, self.ram, strict=True):
            self.uc.mem_map_ptr(start, end - start, UC_PROT_ALL, ctypes.c_void_p(host))
            if region.rom:
                # Only protecting afterwards makes the core drop a store; mapping it so does not.
                self.uc.mem_protect(start, end - start, UC_PROT_READ | UC_PROT_EXEC)
            taken.append((start, end))
        for window in self.wiring.windows:
            self._map_window(window)
            taken.append((window.base, window.base + window.size))
        free = 0
        for start, end in [*sorted(taken), (PHYSICAL_SIZE, PHYSICAL_SIZE)]:
            if free < start:
                self._map_window(self._bus_window(free, start - free))
            free = max(free, end)

        def tolerate(_uc: int, _kind: int, _address: int, _size: int, _value: int, _data: int) -> bool:
            return True

        # A store to ROM is dropped, code fetched from a device reads what the device answers; neither
        # may end the run, as neither would end it on a real machine.
        for kind in (UC_HOOK_MEM_WRITE_PROT, UC_HOOK_MEM_FETCH_PROT):
            for start, end, rom in self._protected():
                if (kind == UC_HOOK_MEM_WRITE_PROT) == rom:
                    self._hook(kind, _MEM_EVENT(tolerate), start, end - 1)

    def _protected(self) -> list[tuple[int, int, bool]]:
        """(start, end, is ROM) of everything that is not plain memory."""
        regions = self.wiring.memory.regions
        found = [(r.start, r.end, True) for r in regions if r.rom]
        free = 0
        for region in regions:
            if free < region.start:
                found.append((free, region.start, False))
            free = region.end
        found.append((free, PHYSICAL_SIZE, False))
        return found

    def _bus_window(self, base: int, size: int) -> Window:
        read, write = self.wiring.bus_read, self.wiring.bus_write
        if base == 0:
            return Window(base, size, read, write)
        return Window(
            base,
            size,
            lambda offset, length: read(base + offset, length),
            lambda offset, length, value: write(base + offset, length, value),
        )

    def _map_window(self, window: Window) -> None:
        read, write, failed = window.read, window.write, self.wiring.failed

        def on_read(_uc: int, offset: int, size: int, _data: int) -> int:
            try:
                return read(offset, size)
            except BaseException as error:  # nothing may unwind into the translated code
                failed(error)
                return (1 << 8 * size) - 1

        def on_write(_uc: int, offset: int, size: int, value: int, _data: int) -> None:
            try:
                write(offset, size, value)
            except BaseException as error:  # nothing may unwind into the translated code
                failed(error)

        getter, putter = _MMIO_READ(on_read), _MMIO_WRITE(on_write)
        self._keep += [getter, putter]
        error = uclib.uc_mmio_map(
            self.uc._uch,
            ctypes.c_uint64(window.base),
            ctypes.c_uint64(window.size),
            getter,
            None,
            putter,
            None,
        )
        if error:
            raise EngineError(f"Unicorn cannot map {window.base:#x}: {_explain(error)}")


def _explain(code: int) -> str:
    kind: Any = UcError
    return str(kind(code))


def _general_register(name: str) -> int:
    """Unicorn's number of ``x0`` .. ``x30`` and ``sp``."""
    if name == "sp":
        return int(UC_ARM64_REG_SP)
    number = int(name[1:]) if name[:1] == "x" and name[1:].isdigit() else 31
    if number <= 28:
        return int(UC_ARM64_REG_X0) + number
    if number <= 30:
        return int(UC_ARM64_REG_X29 if number == 29 else UC_ARM64_REG_X30)
    raise EngineError(f"an aarch64 CPU has no register {name!r}")
