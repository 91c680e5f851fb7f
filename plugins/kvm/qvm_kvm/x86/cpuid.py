"""What CPUID tells the guest: what KVM supports here, as one package of one-thread cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qvm_kvm.ioctls import ioctl_struct
from qvm_kvm.system import KvmSystem
from qvm_kvm.x86 import abi

_LEAF1_ECX_TSC_DEADLINE = 1 << 24
_LEAF1_ECX_HYPERVISOR = 1 << 31
_LEAF1_EDX_HTT = 1 << 28
_LEVEL_SMT = 1 << 8
_LEVEL_CORE = 2 << 8
#: The last APIC ID of the xAPIC is 254; 255 is everybody.
MAX_CPUS = 255


@dataclass(frozen=True, slots=True)
class Leaf:
    """One answer of CPUID."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def supported(system: KvmSystem) -> tuple[Leaf, ...]:
    """What KVM can offer on this host. Raises OSError."""
    table = abi.CpuidTable(abi.CpuidTable.ROOM)
    ioctl_struct(system.fd, abi.GET_SUPPORTED_CPUID, table)
    return tuple(
        Leaf(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[: table.nent]
    )


def physical_bits(leaves: Sequence[Leaf]) -> int:
    """Width of a guest-physical address; 36 where the CPU does not say."""
    for leaf in leaves:
        if leaf.function == 0x80000008:
            return leaf.eax & 0xFF
    return 36


def for_vcpu(leaves: Sequence[Leaf], apic_id: int, cpus: int, *, tsc_deadline: bool) -> tuple[Leaf, ...]:
    """The table of one vCPU among ``cpus``. APIC IDs count from 0."""
    bits = (cpus - 1).bit_length()
    found = []
    for leaf in leaves:
        match leaf.function:
            case 0x1:
                leaf = _features(leaf, apic_id, cpus, tsc_deadline)
            case 0x4 | 0x8000001D:
                leaf = _cache(leaf, cpus)
            case 0xB | 0x1F:
                continue  # replaced by our own below
            case 0x80000008:
                # AMD: how many bits of the APIC ID are the core, and the number of cores less one.
                leaf = replace(leaf, ecx=leaf.ecx & ~0xF0FF | bits << 12 | (cpus - 1))
            case 0x8000001E:
                leaf = replace(leaf, eax=apic_id, ebx=leaf.ebx & ~0xFFFF | apic_id, ecx=0)
        found.append(leaf)
    highest = next((leaf.eax for leaf in leaves if leaf.function == 0), 0)
    for function in (0xB, 0x1F):
        if highest >= function:
            found += _topology(function, apic_id, cpus, bits)
    return tuple(found)


def _features(leaf: Leaf, apic_id: int, cpus: int, tsc_deadline: bool) -> Leaf:
    ecx = leaf.ecx & ~_LEAF1_ECX_TSC_DEADLINE | _LEAF1_ECX_HYPERVISOR
    if tsc_deadline:
        ecx |= _LEAF1_ECX_TSC_DEADLINE
    edx = leaf.edx & ~_LEAF1_EDX_HTT | (_LEAF1_EDX_HTT if cpus > 1 else 0)
    return replace(leaf, ebx=leaf.ebx & 0xFFFF | cpus << 16 | apic_id << 24, ecx=ecx, edx=edx)


def _cache(leaf: Leaf, cpus: int) -> Leaf:
    """Level 1 and 2 belong to one core, further levels to all."""
    if not leaf.eax & 0x1F:
        return leaf  # the end of the list
    sharing = cpus if leaf.eax >> 5 & 7 >= 3 else 1
    eax = leaf.eax & 0x3FFF | (sharing - 1) << 14
    if leaf.function == 0x4:
        eax |= min(cpus - 1, 63) << 26
    return replace(leaf, eax=eax)


def _topology(function: int, apic_id: int, cpus: int, bits: int) -> list[Leaf]:
    significant = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    return [
        Leaf(function, 0, significant, 0, 1, _LEVEL_SMT, apic_id),
        Leaf(function, 1, significant, bits, cpus, 1 | _LEVEL_CORE, apic_id),
        Leaf(function, 2, significant, 0, 0, 2, apic_id),
    ]


def install(vcpu_fd: int, leaves: Sequence[Leaf]) -> None:
    """Give a vCPU its table. Raises OSError."""
    table = abi.CpuidTable(len(leaves))
    for place, leaf in zip(table.entries, leaves, strict=False):
        place.function, place.index, place.flags = leaf.function, leaf.index, leaf.flags
        place.eax, place.ebx, place.ecx, place.edx = leaf.eax, leaf.ebx, leaf.ecx, leaf.edx
    ioctl_struct(vcpu_fd, abi.SET_CPUID2, table)
