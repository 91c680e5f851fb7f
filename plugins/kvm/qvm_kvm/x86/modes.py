"""The state a boot CPU starts in: 16-bit real, 32-bit protected, or 64-bit long mode."""

from __future__ import annotations

from qvm_kvm.ioctls import ioctl_struct
from qvm_kvm.x86 import abi
from qvmcore.api import CpuEntry, EngineError

MODES = ("real16", "protected32", "long64")

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
#: The boot GDT has four entries of 8 bytes.
_GDT_LIMIT = 4 * 8 - 1

_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS_FIXED = 1 << 1


def enter(vcpu_fd: int, entry: CpuEntry) -> None:
    """Set every register for the first instruction. Raises EngineError for a wrong entry."""
    if entry.mode not in MODES:
        raise EngineError(f"an x86 CPU starts in {', '.join(MODES)}, not in {entry.mode!r}")
    values = dict(entry.registers)
    sregs, regs = abi.Sregs(), abi.Regs()
    try:
        ioctl_struct(vcpu_fd, abi.GET_SREGS, sregs)
        _fill(sregs, entry, values)
        regs.rip = entry.pc & 0xFFFF if entry.mode == "real16" else entry.pc
        regs.rflags = values.pop("rflags", 0) | _RFLAGS_FIXED
        for name, value in values.items():
            if name not in abi.GENERAL or name == "rip":
                raise EngineError(f"an x86 CPU in {entry.mode} has no start register {name!r}")
            setattr(regs, name, value)
        ioctl_struct(vcpu_fd, abi.SET_SREGS, sregs)
        ioctl_struct(vcpu_fd, abi.SET_REGS, regs)
    except OSError as error:
        raise EngineError(f"KVM refuses the start state in {entry.mode}: {error.strerror}") from error


def _fill(sregs: abi.Sregs, entry: CpuEntry, values: dict[str, int]) -> None:
    if entry.mode == "real16":
        # Below 64 KiB the segment is 0; above, as at reset, the segment's hidden base is what counts.
        sregs.cs.base = entry.pc & ~0xFFFF
        sregs.cs.selector = entry.pc >> 4 & 0xF000
        return
    long = entry.mode == "long64"
    if "gdt" not in values or (long and "cr3" not in values):
        raise EngineError(f"a start in {entry.mode} needs the registers gdt" + (" and cr3" if long else ""))
    sregs.gdt.base, sregs.gdt.limit = values.pop("gdt"), _GDT_LIMIT
    _flat(sregs.cs, CODE_SELECTOR, 11, long)
    for name in abi.SEGMENTS[1:]:
        _flat(getattr(sregs, name), DATA_SELECTOR, 3, False)
    sregs.cr0 = _CR0_PE | _CR0_ET
    if long:
        sregs.cr0 |= _CR0_PG | _CR0_NE | _CR0_MP
        sregs.cr3 = values.pop("cr3")
        sregs.cr4 = _CR4_PAE
        sregs.efer = _EFER_LME | _EFER_LMA


def _flat(segment: abi.Segment, selector: int, kind: int, long: bool) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFFFFFF, selector, kind
    segment.present, segment.dpl, segment.s, segment.g = 1, 0, 1, 1
    segment.db, segment.l = int(not long), int(long)
    segment.avl = segment.unusable = 0
