"""One guest: its VM, vCPUs, interrupts and doorbells, and its life from start to end.

Threads. Each vCPU runs the guest and every register handler on a thread of its own. Any other thread
may drive an interrupt, ask for the status, pause or stop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from qvm_kvm import exits, kick
from qvm_kvm.arch import Backend
from qvm_kvm.direct import DirectWindows
from qvm_kvm.doorbells import Doorbells
from qvm_kvm.ending import end_of
from qvm_kvm.irq import Interrupts
from qvm_kvm.system import KvmSystem
from qvm_kvm.vcpu import Accesses, Hooks, Vcpu, Write
from qvm_kvm.vm import Vm
from qvmcore.api import (
    AddressSpace,
    CpuEntry,
    EngineError,
    GuestConfig,
    GuestEnd,
    IntrSpec,
    IrqLine,
    MemoryRegion,
    Reason,
)

log = logging.getLogger(__name__)


class KvmGuest:
    """Implements the core's Guest protocol. Raises EngineError; what was made by then is given back."""

    fast_doorbells = True

    def __init__(self, config: GuestConfig, system: KvmSystem, backend_class: type[Backend]) -> None:
        self._config = config
        self._vm: Vm | None = None
        self._vcpus: list[Vcpu] = []
        self._interrupts: Interrupts | None = None
        self._signal = 0
        #: Guards the flags below; vCPUs at rest wait on it.
        self._state = threading.Condition()
        self._pausing = False
        self._ending = False
        self._ended = False
        self._started = False
        self._closed = False
        try:
            self._build(system, backend_class)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise EngineError(f"KVM cannot build the guest: {error.strerror or error}") from error
            raise

    def _build(self, system: KvmSystem, backend_class: type[Backend]) -> None:
        config = self._config
        if config.cpus > system.max_vcpus:
            raise EngineError(
                f"the guest has {config.cpus} CPUs, KVM here allows {system.max_vcpus}", hint="lower cpus"
            )
        self._backend = backend_class(system, config)
        self._vm = vm = Vm(system)
        self._doorbells = Doorbells(vm)
        self._direct = DirectWindows(vm)
        self._interrupts = self._backend.prepare_vm(vm)
        vm.add_memory(config.memory)
        ports = config.ports if config.ports is not None else AddressSpace()
        accesses = Accesses(config.bus.read, self._bus_write(), ports.read, ports.write)
        for index in range(config.cpus):
            self._vcpus.append(Vcpu(vm, self._backend, index, accesses))
        self._signal = kick.acquire()

    def _bus_write(self) -> Write:
        """The bus; with ROM, whose refused stores KVM hands to us, those are dropped as on any machine."""
        write = self._config.bus.write
        roms = [(region.start, region.end) for region in self._config.memory.regions if region.rom]
        if not roms:
            return write

        def write_but_rom(address: int, size: int, value: int) -> None:
            if not any(start <= address < end for start, end in roms):
                write(address, size, value)

        return write_but_rom

    # ---- the Guest protocol --------------------------------------------------------------------

    def irq_line(self, intr: IntrSpec) -> IrqLine:
        """A line of a controller. Raises EngineError for one there is not."""
        return self._backend.line(intr)

    def signal_msi(self, address: int, data: int) -> None:
        """A device's message, by an eventfd after its first use; any thread."""
        if self._interrupts is not None and self._backend.is_message(address):
            self._interrupts.signal_msi(address, data)

    def listen(self, fd: int, address: int, data: int) -> Callable[[], None] | None:
        """A message by somebody else's eventfd; see the protocol."""
        if self._interrupts is None or not self._backend.is_message(address):
            return None
        return self._interrupts.listeners.message(fd, address, data)

    def listen_level(self, intr: IntrSpec, fd: int, resample: int) -> Callable[[], None] | None:
        """A line by somebody else's eventfd; see the protocol."""
        gsi = self._backend.gsi(intr)
        if self._interrupts is None or gsi is None:
            return None
        return self._interrupts.listeners.line(fd, gsi, resample)

    def start(self, entry: CpuEntry) -> None:
        """Start the vCPUs, the first at ``entry``, the others waiting for it, and return."""
        with self._state:
            if self._started or self._closed:
                raise EngineError("the guest was started already")
            self._started = True
        self._backend.enter(self._vcpus[0].fd, entry)
        try:
            self._doorbells.follow(self._config.bus, ports=False, also=self._direct)
            if self._config.ports is not None:
                self._doorbells.follow(self._config.ports, ports=True)
            hooks = Hooks(self._check, self._rare, self._failed, self._gone)
            for vcpu in self._vcpus:
                vcpu.start(self._signal, hooks)
        except (RuntimeError, ValueError) as error:
            self.stop(1.0)
            raise EngineError(f"the guest cannot be started: {error}") from error

    def stop(self, timeout: float) -> bool:
        """Stop every vCPU between two instructions; idempotent. False when one did not stop in time.

        On a vCPU's own thread, it stops when the handler returns; the others are waited for.
        """
        deadline = time.monotonic() + timeout
        with self._state:
            self._ending = True
            self._state.notify_all()
        self._kick()
        stopped = True
        for vcpu in self._vcpus:
            if not vcpu.is_current:
                stopped &= vcpu.join(deadline - time.monotonic())
        return stopped

    def pause(self, timeout: float) -> bool:
        """Hold every vCPU between two instructions; False when one did not come to rest in time."""
        with self._state:
            self._pausing = True
        self._kick()
        with self._state:
            if self._state.wait_for(self._at_rest, timeout):
                return True
        self.resume()
        return False

    def _at_rest(self) -> bool:
        return all(vcpu.parked or not vcpu.running for vcpu in self._vcpus)

    def resume(self) -> None:
        """Let the vCPUs run again."""
        with self._state:
            self._pausing = False
            self._state.notify_all()

    def registers(self) -> Sequence[Mapping[str, int]]:
        """The registers of each vCPU; those of a vCPU that is not at rest are of its last rest."""
        return tuple(vcpu.registers() for vcpu in self._vcpus)

    def status(self) -> Mapping[str, object]:
        """Counters; cheap, any thread.

        ``exits`` by kind are those this process answered: neither a doorbell nor a HLT is among them.
        """
        vcpus = [dict(vcpu.counts) for vcpu in self._vcpus]
        totals: dict[str, int] = {}
        for counts in vcpus:
            for reason, count in counts.items():
                name = exits.name(reason)
                totals[name] = totals.get(name, 0) + count
        interrupts = self._interrupts
        return {
            "running": any(vcpu.running for vcpu in self._vcpus),
            "exits": totals,
            "vcpus": [
                {
                    "exits": sum(counts.values()),
                    "interrupted": vcpu.interrupted,
                    "paused": vcpu.parked,
                    "running": vcpu.running,
                }
                for vcpu, counts in zip(self._vcpus, vcpus, strict=True)
            ],
            "doorbells": self._doorbells.count,
            "doorbells_refused": self._doorbells.refused,
            "direct": self._direct.count,
            "direct_refused": self._direct.refused,
            "irqfds": interrupts.irqfds if interrupts else 0,
            "straight": interrupts.listeners.count if interrupts else 0,
            "msi_routes": interrupts.routes if interrupts else 0,
            "msi_slow": interrupts.slow_messages if interrupts else 0,
            "msi_refused": interrupts.refused if interrupts else 0,
        }

    def close(self) -> None:
        """Give everything back, unless a vCPU refuses to stop. Idempotent."""
        if self._closed:
            return
        if not self.stop(1.0) or any(vcpu.is_current for vcpu in self._vcpus):
            log.error("a vCPU does not stop; its VM stays until this process ends")
            return
        self._release()

    def _release(self) -> None:
        self._closed = True
        if self._interrupts is not None:
            self._interrupts.close()
        if self._vm is not None:
            self._doorbells.close()
            self._direct.close()
        for vcpu in self._vcpus:
            vcpu.close()
        if self._vm is not None:
            self._vm.close()
        if self._signal:
            self._signal = 0
            kick.release()

    # ---- beyond the protocol ---------------------------------------------------------------------

    def log_dirty_pages(self, on: bool = True) -> None:
        """Start or stop recording which pages the guest writes; any thread. Raises EngineError."""
        self._open_vm().log_dirty_pages(on)

    def dirty_pages(self, region: MemoryRegion) -> list[int]:
        """Addresses of the pages of ``region`` the guest wrote since the last call; any thread.

        Devices of this process write past KVM: their pages are not among them. Raises EngineError.
        """
        return self._open_vm().dirty_pages(region)

    def _open_vm(self) -> Vm:
        if self._vm is None or self._closed:
            raise EngineError("the guest is closed")
        return self._vm

    # ---- the vCPU threads ------------------------------------------------------------------------

    def _check(self, vcpu: Vcpu) -> bool:
        """A vCPU was interrupted: wait while paused; whether it goes on."""
        with self._state:
            if self._pausing and not self._ending:
                vcpu.rest()
                vcpu.parked = True
                self._state.notify_all()
                self._state.wait_for(lambda: self._ending or not self._pausing)
                vcpu.parked = False
            return not self._ending

    def _rare(self, vcpu: Vcpu, reason: int) -> bool:
        end = end_of(vcpu, reason, self._backend)
        if end is None:
            return True
        self._end(end)
        return False

    def _failed(self, vcpu: Vcpu, error: BaseException) -> None:
        log.error("vCPU %d failed", vcpu.index, exc_info=error)
        self._end(GuestEnd(Reason.HOST_ERROR, f"engine failure: {type(error).__name__}: {error}"))

    def _gone(self) -> None:
        """A vCPU's thread ends: who waits for its rest need not wait longer."""
        with self._state:
            self._state.notify_all()

    def _end(self, end: GuestEnd) -> None:
        """Report the end once and stop every vCPU; nothing when somebody is stopping the guest already."""
        with self._state:
            first, self._ended = not self._ended and not self._ending, True
            self._ending = True
            self._state.notify_all()
        self._kick()
        if first:
            self._config.on_end(end)

    def _kick(self) -> None:
        for vcpu in self._vcpus:
            vcpu.kick()
