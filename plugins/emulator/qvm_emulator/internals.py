"""What fast mode takes from inside one Unicorn build: offsets, entry points, machine code.

Unicorn's public interface cannot deliver an exception to the guest's own vector, raise an interrupt
without leaving the translated code, stop exactly from another thread, or see instruction-cache
maintenance. The library can: nearly all of its functions are exported, and a few fields have to be
read or written. Everything of that kind is in this file and nowhere else.

The offsets were read off the manylinux x86_64 wheel of Unicorn 2.1.4. They are checked three times:
the library must be that very build (version, and distances between its entry points), the pointers
found must agree with each other (``env_ptr`` is inside the CPU object; every register description
carries the expected name), and the self-test runs a guest that would go wrong if any of them were off.
Never use this class without it.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib


class Unsuitable(Exception):
    """This Unicorn build is not one whose insides are known; the message says what differs."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets in the structures of one build."""

    uc_cpu: int  # engine -> CPU object (pointer)
    uc_no_exit: int  # engine: byte; non-zero = no exit check behind loads and stores (see below)
    cpu_interrupt_request: int  # CPU object: 32-bit set of pending requests
    cpu_env_ptr: int  # CPU object -> architectural state (pointer)
    cpu_icount_decr: int  # CPU object -> 32-bit field whose upper half asks the code to leave
    cpu_env: int  # CPU object: where the architectural state is embedded
    cpu_cp_regs: int  # CPU object -> table of system registers (pointer)
    #: Distances between the entry points of _SYMBOLS, in order: they differ from build to build.
    fingerprint: tuple[int, ...]


LAYOUTS = {
    ("2.1.4", "Linux", "x86_64"): Layout(
        uc_cpu=0x1B8,
        uc_no_exit=0x7F2,
        cpu_interrupt_request=0x1C,
        cpu_env_ptr=0x128,
        cpu_icount_decr=0x130,
        cpu_env=0xA350,
        cpu_cp_regs=0xD510,
        fingerprint=(-0x7660, 0x65F0, -0x76640, 0x5BB40),
    ),
}

# One system register description (stable since 2015; verified by the name it carries).
_REG_NAME, _REG_TYPE, _REG_VALUE = 0, 20, 40
_REG_ACCESSFN, _REG_READFN, _REG_WRITEFN = 72, 80, 88
_TYPE_CONST = 0x02
_TYPE_SPECIAL_MASK = 0xF01
_TYPE_NOP = 0x101
_TYPE_PLAIN = 0x00  # calls readfn and writefn, and ends the translation block after a write

_INTERRUPT_HARD = 2
_LEAVE = 0xFFFF
_NO_ADDRESS = (1 << 64) - 1

#: Exception number the INTR hook is called with for HVC.
EXCEPTION_HVC = 11

_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
_WRITE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)

_DO_INTERRUPT = "arm_cpu_do_interrupt_aarch64"
_GET_REGINFO = "get_arm_cp_reginfo_aarch64"
_TRANSLATE = "arm_cpu_get_phys_page_attrs_debug_aarch64"
_RAM_ADDRESS = "qemu_ram_addr_from_host_aarch64"
_INVALIDATE = "tb_invalidate_phys_range_aarch64"
_SYMBOLS = (_DO_INTERRUPT, _GET_REGINFO, _TRANSLATE, _RAM_ADDRESS, _INVALIDATE)

PAGE = 4096


@dataclass(frozen=True, slots=True)
class SystemRegister:
    """A system register by its encoding; ``name`` is what the build calls it."""

    name: str
    op0: int
    op1: int
    crn: int
    crm: int
    op2: int

    @property
    def key(self) -> int:
        """How the build's own table is keyed: a 64-bit system register (coprocessor 0x13)."""
        return (
            1 << 28 | 0x13 << 16 | self.op0 << 14 | self.op1 << 11 | self.crn << 7 | self.crm << 3 | self.op2
        )


CTR_EL0 = SystemRegister("CTR_EL0", 3, 3, 0, 0, 1)
IC_IVAU = SystemRegister("IC_IVAU", 1, 3, 7, 5, 1)
IC_IALLU = SystemRegister("IC_IALLU", 1, 0, 7, 5, 0)
IC_IALLUIS = SystemRegister("IC_IALLUIS", 1, 0, 7, 1, 0)

#: CTR_EL0 bits for the smallest instruction (3:0) and data (19:16) cache line, log2 of 4-byte words.
CTR_LINE_MASK = 0xF | 0xF << 16
#: Lines of 4 KiB: the guest then issues one maintenance operation a page, not 64.
CTR_PAGE_LINES = 10 | 10 << 16


def _layout(version: str) -> Layout:
    here = (version, platform.system(), platform.machine())
    layout = LAYOUTS.get(here)
    if layout is None:
        raise Unsuitable(f"no verified layout for Unicorn {' '.join(here)}")
    missing = [name for name in _SYMBOLS if not hasattr(uclib, name)]
    if missing:
        raise Unsuitable(f"this Unicorn library does not export {', '.join(missing)}")
    entries = [ctypes.cast(getattr(uclib, name), ctypes.c_void_p).value or 0 for name in _SYMBOLS]
    if tuple(b - a for a, b in pairwise(entries)) != layout.fingerprint:
        raise Unsuitable(f"this is another build of Unicorn {version} than the one that was verified")
    return layout


class Internals:
    """Handles into one ``unicorn.Uc``; it must outlive this object. vCPU thread unless said otherwise."""

    def __init__(self, uc: Any, version: str, failed: Callable[[BaseException], None]) -> None:
        layout = _layout(version)
        self._failed = failed  # told about an exception out of a register's handler
        self._uc = int(uc._uch.value)
        cpu = _pointer(self._uc + layout.uc_cpu)
        if not cpu or _pointer(cpu + layout.cpu_env_ptr) != cpu + layout.cpu_env:
            raise Unsuitable("the CPU object is not where this Unicorn build should have it")
        self._cpu = cpu
        self._registers = _pointer(cpu + layout.cpu_cp_regs)
        self._request = ctypes.c_uint32.from_address(cpu + layout.cpu_interrupt_request)
        self._leave = ctypes.c_uint16.from_address(_pointer(cpu + layout.cpu_icount_decr) + 2)
        self._keep: list[object] = []
        # PYFUNCTYPE: these are short and called from callbacks that hold the GIL anyway.
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        self._reginfo = _function(_GET_REGINFO, pointer, pointer, ctypes.c_uint32)
        self._translate = _function(_TRANSLATE, u64, pointer, u64, pointer)
        self._ram_address = _function(_RAM_ADDRESS, u64, pointer, pointer)
        self._invalidate = _function(_INVALIDATE, None, pointer, u64, u64)
        self._do_interrupt = _function(_DO_INTERRUPT, None, pointer)
        self._attributes = ctypes.create_string_buffer(16)
        # Behind every load and store Unicorn normally checks for a stop; when one arrives just then,
        # PC goes back to an instruction that was already executed. Without these checks the code is
        # left between blocks only, which is exact.
        ctypes.c_uint8.from_address(self._uc + layout.uc_no_exit).value = 1

    # ---- interrupts: any thread --------------------------------------------------------------

    def raise_irq(self) -> None:
        """Assert the IRQ input: the core takes it at the next block, without leaving uc_emu_start.

        The core changes the same word without a lock, so a request made from another thread can be
        lost; whoever raises it must repeat it until the guest acknowledges.
        """
        self._request.value |= _INTERRUPT_HARD
        self._leave.value = _LEAVE

    def lower_irq(self) -> None:
        """De-assert the IRQ input. On another thread than the vCPU's it may be lost: a spurious IRQ."""
        self._request.value &= ~_INTERRUPT_HARD

    # ---- exceptions --------------------------------------------------------------------------

    def deliver_exception(self) -> None:
        """Take the exception the INTR hook was called for to the guest's own vector."""
        self._do_interrupt(self._cpu)

    def native_intr_hook(self, on_hvc: int) -> tuple[int, int] | None:
        """Address and user data of an INTR hook without Python, or None when the host forbids it.

        ``on_hvc`` is the address of a hook of the same type that is called for HVC. The hook is called
        as (engine, number, user data): user data is the CPU object, which becomes the first argument
        of the core's own exception entry.
        """
        target = ctypes.cast(getattr(uclib, _DO_INTERRUPT), ctypes.c_void_p).value or 0
        code = (
            b"\x83\xfe"
            + bytes([EXCEPTION_HVC])  # cmp  esi, 11
            + b"\x74\x0f"  # je   hvc
            + b"\x48\x89\xd7"  # mov  rdi, rdx
            + b"\x48\xb8"
            + target.to_bytes(8, "little")  # mov  rax, entry
            + b"\xff\xe0"  # jmp  rax
            + b"\x48\xb8"
            + on_hvc.to_bytes(8, "little")  # hvc: mov  rax, on_hvc
            + b"\xff\xe0"  # jmp  rax
        )
        try:
            page = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError:
            return None
        page.write(code)
        anchor = ctypes.c_char.from_buffer(page)
        self._keep += [page, anchor]
        return ctypes.addressof(anchor), self._cpu

    # ---- system registers: before the first instruction is translated ------------------------

    def patch_register(
        self, register: SystemRegister, write: Callable[[int], None], read: Callable[[], int] | None = None
    ) -> None:
        """Have ``register`` call ``write(value)`` and, when given, ``read()``."""
        info, failed = self._find(register), self._failed

        def on_write(_env: int, _info: int, value: int) -> None:
            try:
                write(value)
            except BaseException as error:  # nothing may unwind into the translated code
                failed(error)

        self._set_pointer(info + _REG_WRITEFN, _WRITE(on_write))
        if read is not None:
            get = read

            def on_read(_env: int, _info: int) -> int:
                try:
                    return get()
                except BaseException as error:  # nothing may unwind into the translated code
                    failed(error)
                    return 0

            self._set_pointer(info + _REG_READFN, _READ(on_read))
        kind = ctypes.c_uint32.from_address(info + _REG_TYPE)
        if kind.value & _TYPE_SPECIAL_MASK == _TYPE_NOP:
            kind.value = _TYPE_PLAIN

    def patch_constant(self, register: SystemRegister, mask: int, value: int) -> None:
        """Replace the bits of ``mask`` in a constant register."""
        info = self._find(register)
        if ctypes.c_uint32.from_address(info + _REG_TYPE).value & _TYPE_CONST == 0:
            raise Unsuitable(f"{register.name} is not a constant in this Unicorn build")
        field = ctypes.c_uint64.from_address(info + _REG_VALUE)
        field.value = field.value & ~mask | value

    def _find(self, register: SystemRegister) -> int:
        info = self._reginfo(self._registers, register.key)
        name = ctypes.string_at(_pointer(info + _REG_NAME)) if info else b""
        if name != register.name.encode():
            raise Unsuitable(f"system register {register.name} not found in this Unicorn build")
        return int(info)

    def _set_pointer(self, address: int, callback: Any) -> None:
        self._keep.append(callback)
        pointer = ctypes.c_uint64.from_address(address)
        pointer.value = ctypes.cast(callback, ctypes.c_void_p).value or 0

    # ---- translated code ---------------------------------------------------------------------

    def physical_page(self, virtual: int) -> int | None:
        """Guest-physical page of ``virtual`` in the current regime, or None when it is not mapped.

        Works for pages that are not executable here, and leaves the TLB alone.
        """
        physical = int(self._translate(self._cpu, virtual & -PAGE, self._attributes))
        return None if physical == _NO_ADDRESS else physical & -PAGE

    def forget_page(self, host: int) -> None:
        """Drop every translation made from the RAM page at host address ``host``."""
        ram = int(self._ram_address(self._uc, host))
        if ram != _NO_ADDRESS:
            self._invalidate(self._uc, ram, ram + PAGE)


def _pointer(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _function(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, uclib))
