"""x86-64: the fixed addresses KVM needs, the in-kernel PIC, IOAPIC, APICs and PIT, and their inputs."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from typing import ClassVar

from qvm_kvm import ioctls
from qvm_kvm.ioctls import ioctl, ioctl_struct
from qvm_kvm.irq import Interrupts
from qvm_kvm.structs import Route
from qvm_kvm.system import KvmSystem
from qvm_kvm.vm import Vm
from qvm_kvm.x86 import abi, cpuid, modes, state
from qvmcore.api import CpuEntry, EngineError, GuestConfig, IntrSpec, IrqLine

log = logging.getLogger(__name__)

#: KVM runs real mode through these on CPUs that cannot do without; the board keeps them free.
IDENTITY_MAP = 0xFFFBC000
TSS = 0xFFFBD000
#: Where KVM has its controllers; it cannot move them.
IOAPIC_BASE = 0xFEC00000
APIC_BASE = 0xFEE00000
APIC_SIZE = 0x100000
_CHIP_PIC_MASTER, _CHIP_PIC_SLAVE, _CHIP_IOAPIC = 0, 1, 2
IOAPIC_PINS = 24
#: No memory may be there: IOAPIC, APIC, identity map and the three pages behind it.
_RESERVED = ((IOAPIC_BASE, 0x1000), (APIC_BASE, APIC_SIZE), (IDENTITY_MAP, 0x4000))
_PIC_PINS = 16
#: GSI 0, the timer, is wired to this pin of the IOAPIC, as on every PC.
_TIMER_PIN = 2
#: What the board with PCI lays out ends below 2^39.
_BOARD_BITS = 39

_KINDS: Mapping[str, tuple[int, ...]] = {
    "ioapic": (IOAPIC_BASE,),
    "apic": (APIC_BASE,),
    "i8259": (),
    "i8254": (),
}

_MSR_MISC_ENABLE, _FAST_STRINGS = 0x1A0, 1
_MSR_MTRR_DEFAULT, _MTRR_ON_WRITE_BACK = 0x2FF, 0x806


class X86Backend:
    """Implements :class:`qvm_kvm.arch.Backend`."""

    needed: ClassVar[Mapping[str, int]] = {
        "KVM_CAP_SET_TSS_ADDR": abi.CAP_SET_TSS_ADDR,
        "KVM_CAP_SET_IDENTITY_MAP_ADDR": abi.CAP_SET_IDENTITY_MAP_ADDR,
        "KVM_CAP_EXT_CPUID": abi.CAP_EXT_CPUID,
        "KVM_CAP_PIT2": abi.CAP_PIT2,
    }

    def __init__(self, system: KvmSystem, config: GuestConfig) -> None:
        self._config = config
        self._leaves = cpuid.supported(system)
        self._tsc_deadline = bool(system.capability(abi.CAP_TSC_DEADLINE_TIMER))
        self._resample = bool(system.capability(ioctls.CAP_IRQFD_RESAMPLE))
        self._interrupts: Interrupts | None = None
        self._controllers = {each.name: each for each in config.controllers}
        for each in config.controllers:
            bases = tuple(base for base, _size in each.windows)
            if each.kind not in _KINDS or (bases and bases != _KINDS[each.kind]):
                at = f" at {bases[0]:#x}" if bases else ""
                raise EngineError(
                    f"KVM has no interrupt controller {each.kind}{at}",
                    hint="it has ioapic at 0xfec00000, apic at 0xfee00000, i8259 and i8254",
                )
        if config.cpus > cpuid.MAX_CPUS:
            raise EngineError(
                f"an x86 guest has at most {cpuid.MAX_CPUS} CPUs, not {config.cpus}", hint="lower cpus"
            )
        self._check_memory(config)
        self._check_width(config)

    def _check_memory(self, config: GuestConfig) -> None:
        for region in config.memory.regions:
            for start, size in _RESERVED:
                if region.start < start + size and start < region.end:
                    raise EngineError(
                        f"memory [{region.start:#x}, {region.end:#x}) covers "
                        f"[{start:#x}, {start + size:#x}), which KVM needs for itself",
                        hint="leave the last 20 MiB below 4 GiB free of memory",
                    )

    def _check_width(self, config: GuestConfig) -> None:
        bits = cpuid.physical_bits(self._leaves)
        wanted = max(
            [(region.end - 1).bit_length() for region in config.memory.regions]
            + ([_BOARD_BITS] if config.msi is not None else [])
            + [32]
        )
        if bits < wanted:
            raise EngineError(
                f"the guest needs physical addresses of {wanted} bits, this host's CPU has {bits}",
                hint="give the guest less memory"
                + (", or a machine without PCI" if config.msi is not None else ""),
            )

    def prepare_vm(self, vm: Vm) -> Interrupts:
        """See Backend."""
        try:
            ioctl_struct(vm.fd, abi.SET_IDENTITY_MAP_ADDR, _Address(IDENTITY_MAP))
            ioctl(vm.fd, abi.SET_TSS_ADDR, TSS)
            ioctl(vm.fd, ioctls.CREATE_IRQCHIP)
            _mask_pics(vm)
            # The speaker flag makes port 0x61 the kernel's: Linux times the PIT's channel 2 by it.
            ioctl_struct(vm.fd, abi.CREATE_PIT2, abi.PitConfig(abi.PIT_SPEAKER_DUMMY))
            self._interrupts = Interrupts(vm, _pins(), IOAPIC_PINS, resample=self._resample)
        except OSError as error:
            raise EngineError(f"KVM cannot build the interrupt controllers: {error.strerror}") from error
        return self._interrupts

    def line(self, intr: IntrSpec) -> IrqLine:
        """See Backend: ``ioapic:N`` is a GSI, ``apic:N`` a message with vector N to the first CPU."""
        assert self._interrupts is not None
        controller = self._controllers.get(intr.controller)
        if controller is None or intr.number not in controller.lines:
            have = ", ".join(
                f"{each.name}:{each.lines.start} to {each.name}:{each.lines.stop - 1}"
                for each in self._controllers.values()
                if each.lines
            )
            raise EngineError(f"no interrupt {intr}", hint=f"there are {have or 'none'}")
        if controller.kind == "apic":
            return self._interrupts.message_line(APIC_BASE, intr.number)
        if intr.number in (0, _TIMER_PIN) or intr.number >= IOAPIC_PINS:
            raise EngineError(
                f"{intr} cannot be a vdev's interrupt",
                hint=f"pins 0 and {_TIMER_PIN} belong to the timer, and the last one is {IOAPIC_PINS - 1}",
            )
        return self._interrupts.line(intr.number)

    def gsi(self, intr: IntrSpec) -> int | None:
        """See Backend."""
        controller = self._controllers.get(intr.controller)
        return intr.number if controller is not None and controller.kind == "ioapic" else None

    def is_message(self, address: int) -> bool:
        """See Backend."""
        return APIC_BASE <= address < APIC_BASE + APIC_SIZE

    def prepare_vcpu(self, fd: int, index: int) -> None:
        """See Backend."""
        leaves = cpuid.for_vcpu(self._leaves, index, self._config.cpus, tsc_deadline=self._tsc_deadline)
        cpuid.install(fd, leaves)
        _set_msr(fd, _MSR_MISC_ENABLE, _FAST_STRINGS)
        _set_msr(fd, _MSR_MTRR_DEFAULT, _MTRR_ON_WRITE_BACK)

    def enter(self, fd: int, entry: CpuEntry) -> None:
        """See Backend."""
        modes.enter(fd, entry)

    def registers(self, fd: int) -> Mapping[str, int]:
        """See Backend."""
        return state.registers(fd)

    def code(self, fd: int, registers: Mapping[str, int]) -> bytes:
        """See Backend."""
        return state.code_at(fd, self._config.memory, registers)

    def where(self, registers: Mapping[str, int]) -> str:
        """See Backend."""
        if "rip" not in registers:
            return "rip unknown"
        if registers.get("cs") == 0xF000 and registers.get("rip") == 0xFFF0:
            return "rip unknown: this CPU resets the registers"
        return f"rip {registers['rip']:#x}"


class _Address(ctypes.Structure):
    _fields_ = [("value", ctypes.c_uint64)]


def _mask_pics(vm: Vm) -> None:
    """As firmware leaves them: a guest that uses the IOAPIC alone must not get their interrupts, too."""
    for number in (_CHIP_PIC_MASTER, _CHIP_PIC_SLAVE):
        chip = abi.Chip(number)
        ioctl_struct(vm.fd, abi.GET_IRQCHIP, chip)
        chip.state[abi.PIC_MASK] = 0xFF
        ioctl_struct(vm.fd, abi.SET_IRQCHIP, chip)


def _pins() -> list[Route]:
    """GSI n goes to pin n of the PICs and of the IOAPIC, whichever the guest uses; the timer to pin 2."""
    found = []
    for gsi in range(_PIC_PINS):
        if gsi != _TIMER_PIN:  # the PICs are chained there
            found.append(_pin(gsi, _CHIP_PIC_SLAVE if gsi >= 8 else _CHIP_PIC_MASTER, gsi % 8))
    for gsi in range(IOAPIC_PINS):
        if gsi != _TIMER_PIN:
            found.append(_pin(gsi, _CHIP_IOAPIC, gsi or _TIMER_PIN))
    return found


def _pin(gsi: int, chip: int, pin: int) -> Route:
    route = Route(gsi, ioctls.ROUTE_IRQCHIP)
    route.u.irqchip.irqchip, route.u.irqchip.pin = chip, pin
    return route


def _set_msr(fd: int, index: int, value: int) -> None:
    """What firmware sets. A host that does not let us runs the guest all the same."""
    table = abi.MsrTable(1)
    table.entries[0] = abi.MsrEntry(index, 0, value)
    try:
        done = ioctl_struct(fd, abi.SET_MSRS, table)
    except OSError as error:
        log.debug("cannot set MSR %#x: %s", index, error.strerror)
        return
    if done != 1:
        log.debug("KVM does not take %#x for MSR %#x", value, index)
