"""What CPUID tells each vCPU; no KVM is needed."""

from __future__ import annotations

from typing import Any

import pytest
from qvm_kvm.x86 import cpuid
from qvm_kvm.x86.cpuid import Leaf

HYPERVISOR, TSC_DEADLINE, HTT = 1 << 31, 1 << 24, 1 << 28

HOST = (
    Leaf(0x0, 0, 0, 0x1F, 1, 2, 3),
    Leaf(0x1, 0, 0, 0x806F8, 0x0510_08FF & 0xFFFFFFFF, TSC_DEADLINE | 1, HTT | 0xFFFF),
    Leaf(0x4, 0, 1, 0xFC00_C121, 2, 3, 4),
    Leaf(0x4, 3, 1, 0xFC1F_C163, 2, 3, 4),
    Leaf(0x4, 4, 1, 0, 0, 0, 0),
    Leaf(0xB, 0, 1, 1, 2, 0x100, 99),
    Leaf(0xB, 1, 1, 7, 64, 0x201, 99),
    Leaf(0x1F, 0, 1, 1, 2, 0x100, 99),
    Leaf(0x4000_0000, 0, 0, 1, 2, 3, 4),
    Leaf(0x8000_0008, 0, 0, 0x3034, 0, 0x703F, 0),
    Leaf(0x8000_001E, 0, 0, 99, 0x163, 0x303, 0),
)


def table(apic_id: int, cpus: int, **options: Any) -> dict[tuple[int, int], Leaf]:
    leaves = cpuid.for_vcpu(HOST, apic_id, cpus, **{"tsc_deadline": True, **options})
    found = {(leaf.function, leaf.index): leaf for leaf in leaves}
    assert len(found) == len(leaves)
    return found


@pytest.mark.parametrize("apic_id", [0, 1, 5])
def test_every_leaf_that_has_it_gives_the_cpus_own_apic_id(apic_id: int) -> None:
    found = table(apic_id, 6)
    assert found[1, 0].ebx >> 24 == apic_id
    assert {found[function, index].edx for function in (0xB, 0x1F) for index in range(3)} == {apic_id}
    assert found[0x8000_001E, 0].eax == apic_id


def test_a_guest_sees_that_it_is_one_and_the_deadline_timer_if_there_is_one() -> None:
    assert table(0, 1)[1, 0].ecx == HYPERVISOR | TSC_DEADLINE | 1
    assert table(0, 1, tsc_deadline=False)[1, 0].ecx == HYPERVISOR | 1


def test_one_package_of_cores_with_one_thread_each() -> None:
    found = table(2, 6)
    assert found[1, 0].ebx >> 16 & 0xFF == 6
    assert found[1, 0].ebx & 0xFFFF == 0x08FF
    assert found[1, 0].edx == HTT | 0xFFFF
    assert (found[0xB, 0].eax, found[0xB, 0].ebx, found[0xB, 0].ecx) == (0, 1, 0x100)
    assert (found[0xB, 1].eax, found[0xB, 1].ebx, found[0xB, 1].ecx) == (3, 6, 0x201)
    assert (found[0xB, 2].ebx, found[0xB, 2].ecx) == (0, 2)
    assert found[0x4, 0].eax == 5 << 26 | 0x121  # L1: its own
    assert found[0x4, 3].eax == 5 << 26 | 5 << 14 | 0x163 | 0xC163 & 0x3E00  # L3: everybody's
    assert found[0x4, 4].eax == 0
    assert found[0x8000_0008, 0].ecx == 3 << 12 | 5


def test_one_cpu_has_no_topology() -> None:
    found = table(0, 1)
    assert found[1, 0].edx == 0xFFFF
    assert (found[0xB, 1].eax, found[0xB, 1].ebx) == (0, 1)
    assert found[0x4, 3].eax >> 14 == 0


def test_the_other_leaves_are_as_kvm_gives_them() -> None:
    assert table(3, 4)[0x4000_0000, 0] == HOST[-3]


def test_leaves_a_cpu_does_not_have_are_not_made_up() -> None:
    old = (Leaf(0x0, 0, 0, 0xA, 0, 0, 0),)
    assert [leaf.function for leaf in cpuid.for_vcpu(old, 0, 2, tsc_deadline=True)] == [0]


def test_the_width_of_addresses() -> None:
    assert cpuid.physical_bits(HOST) == 0x34
    assert cpuid.physical_bits(HOST[:3]) == 36
