"""Numbers and structures of <asm/kvm.h> for x86-64."""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

from qvm_kvm.ioctls import io, ior, iow, iowr

GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags"),
)
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


class Regs(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = [(name, c_uint64) for name in GENERAL]


class Segment(ctypes.Structure):
    """struct kvm_segment: a segment register with its hidden part."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class Table(ctypes.Structure):
    """struct kvm_dtable: GDTR or IDTR."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, Segment) for name in (*SEGMENTS, "tr", "ldt")),
        ("gdt", Table),
        ("idt", Table),
        *((name, c_uint64) for name in CONTROL),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    ]


class CpuidTable(ctypes.Structure):
    """struct kvm_cpuid2 with room for what any CPU has."""

    ROOM = 256
    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry * ROOM)]


class MsrEntry(ctypes.Structure):
    """struct kvm_msr_entry."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class MsrTable(ctypes.Structure):
    """struct kvm_msrs with room for a few."""

    ROOM = 8
    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32), ("entries", MsrEntry * ROOM)]


class PitConfig(ctypes.Structure):
    """struct kvm_pit_config."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class Chip(ctypes.Structure):
    """struct kvm_irqchip: the state of a PIC or the IOAPIC."""

    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("state", c_uint8 * 512)]


class Translation(ctypes.Structure):
    """struct kvm_translation: a virtual address and where it is."""

    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    ]


GET_SUPPORTED_CPUID = iowr(0x05, 8)
SET_TSS_ADDR = io(0x47)
SET_IDENTITY_MAP_ADDR = iow(0x48, 8)
GET_IRQCHIP = iowr(0x62, ctypes.sizeof(Chip))
SET_IRQCHIP = ior(0x63, ctypes.sizeof(Chip))  # so in the kernel's header, though it is a write
CREATE_PIT2 = iow(0x77, ctypes.sizeof(PitConfig))
GET_REGS = ior(0x81, ctypes.sizeof(Regs))
SET_REGS = iow(0x82, ctypes.sizeof(Regs))
GET_SREGS = ior(0x83, ctypes.sizeof(Sregs))
SET_SREGS = iow(0x84, ctypes.sizeof(Sregs))
TRANSLATE = iowr(0x85, ctypes.sizeof(Translation))
SET_MSRS = iow(0x89, 8)
SET_CPUID2 = iow(0x90, 8)

CAP_SET_TSS_ADDR = 4
CAP_EXT_CPUID = 7
CAP_PIT2 = 33
CAP_SET_IDENTITY_MAP_ADDR = 37
CAP_TSC_DEADLINE_TIMER = 72

PIT_SPEAKER_DUMMY = 1
#: Index of the interrupt mask in the state of a PIC (struct kvm_pic_state).
PIC_MASK = 2
