"""What an architecture adds to the neutral part. x86-64 is built; arm64 would be a second one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from qvm_kvm.irq import Interrupts
from qvm_kvm.system import KvmSystem
from qvm_kvm.vm import Vm
from qvmcore.api import CpuEntry, GuestConfig, IntrSpec, IrqLine


class Backend(Protocol):
    """One VM's architecture. Every call that fails raises EngineError or OSError."""

    #: What KVM must have, by the kernel's names.
    needed: ClassVar[Mapping[str, int]]

    def __init__(self, system: KvmSystem, config: GuestConfig) -> None:
        """Check that this host can run ``config``, before anything is made."""

    def prepare_vm(self, vm: Vm) -> Interrupts:
        """Add the interrupt controllers, before memory and vCPUs."""

    def line(self, intr: IntrSpec) -> IrqLine:
        """The input ``intr`` of a controller."""

    def gsi(self, intr: IntrSpec) -> int | None:
        """Its number in the kernel's table; None when it is not in there."""

    def is_message(self, address: int) -> bool:
        """Whether a device's write to ``address`` is a message-signalled interrupt."""

    def prepare_vcpu(self, fd: int, index: int) -> None:
        """Identity and reset state of vCPU ``index``."""

    def enter(self, fd: int, entry: CpuEntry) -> None:
        """Set the registers of the boot vCPU."""

    def registers(self, fd: int) -> Mapping[str, int]:
        """Registers by name; waits for a vCPU that is in the guest."""

    def code(self, fd: int, registers: Mapping[str, int]) -> bytes:
        """The bytes of the instruction under way and behind it; empty when unknown."""

    def where(self, registers: Mapping[str, int]) -> str:
        """In words where a vCPU is, for an error: ``rip 0x1000``."""
