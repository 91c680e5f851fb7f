"""Numbers and structures against <linux/kvm.h> itself, and the layout of the page shared with a vCPU."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from qvm_kvm import exits, ioctls, runpage, structs
from qvm_kvm.x86 import abi

STRUCTS = {
    "struct kvm_userspace_memory_region": structs.MemorySlot,
    "struct kvm_dirty_log": structs.DirtyLog,
    "struct kvm_irq_level": structs.IrqLevel,
    "struct kvm_irqfd": structs.IrqFd,
    "struct kvm_ioeventfd": structs.IoEventFd,
    "struct kvm_msi": structs.Msi,
    "struct kvm_irq_routing_entry": structs.Route,
    "struct kvm_irq_routing": structs.RoutingHeader,
    "struct kvm_regs": abi.Regs,
    "struct kvm_sregs": abi.Sregs,
    "struct kvm_segment": abi.Segment,
    "struct kvm_dtable": abi.Table,
    "struct kvm_cpuid_entry2": abi.CpuidEntry,
    "struct kvm_msr_entry": abi.MsrEntry,
    "struct kvm_pit_config": abi.PitConfig,
    "struct kvm_translation": abi.Translation,
    "struct kvm_irqchip": abi.Chip,
}

FIELDS = {
    "struct kvm_ioeventfd": ("datamatch", "addr", "len", "fd", "flags"),
    "struct kvm_irqfd": ("fd", "gsi", "flags", "resamplefd"),
    "struct kvm_irq_routing_entry": ("gsi", "type", "flags", "u"),
    "struct kvm_sregs": ("cs", "ss", "tr", "gdt", "idt", "cr0", "cr4", "efer", "apic_base"),
    "struct kvm_regs": ("rax", "rsp", "r8", "rip", "rflags"),
    "struct kvm_segment": ("base", "limit", "selector", "type", "present", "l", "g", "unusable"),
}

NUMBERS = {
    "KVM_API_VERSION": ioctls.API_VERSION,
    "KVM_GET_API_VERSION": ioctls.GET_API_VERSION,
    "KVM_CREATE_VM": ioctls.CREATE_VM,
    "KVM_CHECK_EXTENSION": ioctls.CHECK_EXTENSION,
    "KVM_GET_VCPU_MMAP_SIZE": ioctls.GET_VCPU_MMAP_SIZE,
    "KVM_CREATE_VCPU": ioctls.CREATE_VCPU,
    "KVM_GET_DIRTY_LOG": ioctls.GET_DIRTY_LOG,
    "KVM_SET_USER_MEMORY_REGION": ioctls.SET_USER_MEMORY_REGION,
    "KVM_CREATE_IRQCHIP": ioctls.CREATE_IRQCHIP,
    "KVM_IRQ_LINE": ioctls.IRQ_LINE,
    "KVM_SET_GSI_ROUTING": ioctls.SET_GSI_ROUTING,
    "KVM_IRQFD": ioctls.IRQFD,
    "KVM_IOEVENTFD": ioctls.IOEVENTFD,
    "KVM_SIGNAL_MSI": ioctls.SIGNAL_MSI,
    "KVM_RUN": ioctls.RUN,
    "KVM_CAP_IRQCHIP": ioctls.CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": ioctls.CAP_USER_MEMORY,
    "KVM_CAP_NR_VCPUS": ioctls.CAP_NR_VCPUS,
    "KVM_CAP_MAX_VCPUS": ioctls.CAP_MAX_VCPUS,
    "KVM_CAP_IRQ_ROUTING": ioctls.CAP_IRQ_ROUTING,
    "KVM_CAP_IRQFD": ioctls.CAP_IRQFD,
    "KVM_CAP_IRQFD_RESAMPLE": ioctls.CAP_IRQFD_RESAMPLE,
    "KVM_IRQFD_FLAG_DEASSIGN": ioctls.IRQFD_DEASSIGN,
    "KVM_IRQFD_FLAG_RESAMPLE": ioctls.IRQFD_RESAMPLE,
    "KVM_CAP_IOEVENTFD": ioctls.CAP_IOEVENTFD,
    "KVM_CAP_SIGNAL_MSI": ioctls.CAP_SIGNAL_MSI,
    "KVM_CAP_READONLY_MEM": ioctls.CAP_READONLY_MEM,
    "KVM_CAP_IMMEDIATE_EXIT": ioctls.CAP_IMMEDIATE_EXIT,
    "KVM_MEM_LOG_DIRTY_PAGES": ioctls.MEM_LOG_DIRTY_PAGES,
    "KVM_MEM_READONLY": ioctls.MEM_READONLY,
    "KVM_IOEVENTFD_FLAG_DATAMATCH": ioctls.IOEVENTFD_DATAMATCH,
    "KVM_IOEVENTFD_FLAG_PIO": ioctls.IOEVENTFD_PIO,
    "KVM_IOEVENTFD_FLAG_DEASSIGN": ioctls.IOEVENTFD_DEASSIGN,
    "KVM_IRQ_ROUTING_IRQCHIP": ioctls.ROUTE_IRQCHIP,
    "KVM_IRQ_ROUTING_MSI": ioctls.ROUTE_MSI,
    "KVM_GET_SUPPORTED_CPUID": abi.GET_SUPPORTED_CPUID,
    "KVM_SET_TSS_ADDR": abi.SET_TSS_ADDR,
    "KVM_SET_IDENTITY_MAP_ADDR": abi.SET_IDENTITY_MAP_ADDR,
    "KVM_CREATE_PIT2": abi.CREATE_PIT2,
    "KVM_GET_IRQCHIP": abi.GET_IRQCHIP,
    "KVM_SET_IRQCHIP": abi.SET_IRQCHIP,
    "KVM_GET_REGS": abi.GET_REGS,
    "KVM_SET_REGS": abi.SET_REGS,
    "KVM_GET_SREGS": abi.GET_SREGS,
    "KVM_SET_SREGS": abi.SET_SREGS,
    "KVM_TRANSLATE": abi.TRANSLATE,
    "KVM_SET_MSRS": abi.SET_MSRS,
    "KVM_SET_CPUID2": abi.SET_CPUID2,
    "KVM_CAP_SET_TSS_ADDR": abi.CAP_SET_TSS_ADDR,
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": abi.CAP_SET_IDENTITY_MAP_ADDR,
    "KVM_CAP_EXT_CPUID": abi.CAP_EXT_CPUID,
    "KVM_CAP_PIT2": abi.CAP_PIT2,
    "KVM_CAP_TSC_DEADLINE_TIMER": abi.CAP_TSC_DEADLINE_TIMER,
    "KVM_PIT_SPEAKER_DUMMY": abi.PIT_SPEAKER_DUMMY,
    "KVM_EXIT_IO": exits.EXIT_IO,
    "KVM_EXIT_MMIO": exits.EXIT_MMIO,
    "KVM_EXIT_IRQ_WINDOW_OPEN": exits.EXIT_IRQ_WINDOW_OPEN,
    "KVM_EXIT_SHUTDOWN": exits.EXIT_SHUTDOWN,
    "KVM_EXIT_FAIL_ENTRY": exits.EXIT_FAIL_ENTRY,
    "KVM_EXIT_INTR": exits.EXIT_INTR,
    "KVM_EXIT_INTERNAL_ERROR": exits.EXIT_INTERNAL_ERROR,
    "KVM_EXIT_SYSTEM_EVENT": exits.EXIT_SYSTEM_EVENT,
    "KVM_SYSTEM_EVENT_SHUTDOWN": exits.SYSTEM_SHUTDOWN,
    "KVM_SYSTEM_EVENT_RESET": exits.SYSTEM_RESET,
    "KVM_SYSTEM_EVENT_CRASH": exits.SYSTEM_CRASH,
    "KVM_INTERNAL_ERROR_EMULATION": exits.EMULATION,
    "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES": exits.EMULATION_HAS_BYTES,
    "RUN(immediate_exit)": runpage.IMMEDIATE_EXIT,
    "RUN(exit_reason)": 4 * runpage.REASON,
    "RUN(io.direction)": runpage.IO_DIRECTION,
    "RUN(io.size)": runpage.IO_SIZE,
    "RUN(io.port)": 2 * runpage.IO_PORT,
    "RUN(io.count)": 4 * runpage.IO_COUNT,
    "RUN(io.data_offset)": 8 * runpage.IO_OFFSET,
    "RUN(mmio.phys_addr)": 8 * runpage.MMIO_ADDRESS,
    "RUN(mmio.data)": runpage.MMIO_DATA,
    "RUN(mmio.len)": 4 * runpage.MMIO_LENGTH,
    "RUN(mmio.is_write)": runpage.MMIO_IS_WRITE,
    "RUN(fail_entry.hardware_entry_failure_reason)": 8 * runpage.FAIL_REASON,
    "RUN(system_event.type)": 4 * runpage.EVENT_TYPE,
    "RUN(internal.suberror)": 4 * runpage.SUBERROR,
    "RUN(internal.ndata)": 4 * runpage.SUBERROR_NDATA,
    "RUN(internal.data)": 8 * runpage.SUBERROR_DATA,
    "RUN(emulation_failure.insn_size)": runpage.INSTRUCTION_SIZE,
    "RUN(emulation_failure.insn_bytes)": runpage.INSTRUCTION,
    "offsetof(struct kvm_pic_state, imr)": abi.PIC_MASK,
}


def test_sizes_known_by_heart() -> None:
    """Also where there is no compiler."""
    sizes = {cls.__name__: ctypes.sizeof(cls) for cls in STRUCTS.values()}
    assert sizes == {
        "MemorySlot": 32,
        "DirtyLog": 16,
        "IrqLevel": 8,
        "IrqFd": 32,
        "IoEventFd": 64,
        "Msi": 32,
        "Route": 48,
        "RoutingHeader": 8,
        "Regs": 144,
        "Sregs": 312,
        "Segment": 24,
        "Table": 16,
        "CpuidEntry": 40,
        "MsrEntry": 16,
        "PitConfig": 64,
        "Translation": 24,
        "Chip": 520,
    }
    assert ioctls.RUN == 0xAE80
    assert ioctls.SET_USER_MEMORY_REGION == 0x4020AE46


def test_everything_is_as_the_kernels_header_says(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no C compiler, or no <linux/kvm.h>")
    if platform.machine() != "x86_64":
        pytest.skip(f"<asm/kvm.h> here is that of {platform.machine()}")
    wanted = {f"(unsigned long long)({name})": value for name, value in NUMBERS.items()}
    wanted |= {f"sizeof({name})": ctypes.sizeof(cls) for name, cls in STRUCTS.items()}
    for name, fields in FIELDS.items():
        for field in fields:
            wanted[f"offsetof({name}, {field})"] = getattr(STRUCTS[name], field).offset
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({name}));\n' for name in wanted)
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
        "#define RUN(field) offsetof(struct kvm_run, field)\n"
        f"int main(void) {{\n{lines}return 0;\n}}\n"
    )
    program = tmp_path / "numbers"
    subprocess.run([compiler, "-o", program, source], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(wanted, map(int, printed), strict=True)) == wanted


def test_an_exit_of_a_newer_kernel_has_a_name() -> None:
    assert exits.name(77) == "exit-77"
    assert exits.suberror(9) == "suberror 9"
