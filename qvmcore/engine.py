"""What an engine must offer (floor 2): protocols only, no engine lives in the core.

An engine runs guests. ``Engine.create_guest`` gives a :class:`Guest`: the vCPUs and the interrupt
controller of one VM. Everything the guest touches outside its memory and the controller's own
windows goes through ``GuestConfig.bus``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from qvmcore.bus import AddressSpace
from qvmcore.irq import IrqLine
from qvmcore.memory import GuestMemory
from qvmcore.types import GuestEnd, IntrSpec


@dataclass(frozen=True, slots=True)
class Controller:
    """An interrupt controller that belongs to the board and is provided by the engine.

    ``kind`` e.g. ``gicv2``; ``name`` is what ``intr = "gic:41"`` uses; ``windows`` are its
    (base, size) ranges in bytes and ``ports`` its ranges of I/O ports, both answered by the engine;
    ``lines`` the interrupt numbers a vdev may use.
    """

    kind: str
    name: str
    windows: tuple[tuple[int, int], ...]
    lines: range
    ports: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class MsiFrame:
    """Where message-signalled interrupts are written to: a message raises an interrupt, as an edge.

    ``kind`` e.g. ``gicv2m`` (the message is the number of a line) or ``apic`` (it says vector and
    CPU); ``controller`` names the controller it belongs to; ``lines`` are its interrupt numbers,
    which no vdev may use. ``base`` and ``size`` are bytes.
    """

    kind: str
    controller: str
    base: int
    size: int
    lines: range


@dataclass(frozen=True, slots=True)
class CpuEntry:
    """Where the boot CPU starts: guest-physical ``pc`` and named registers (``x0``, ``rax`` ...).

    On x86 ``mode`` is ``real16``, ``protected32`` or ``long64``. For the latter two the loader has put a
    table of four flat segment descriptors into guest memory, whose address is the register ``gdt``:
    selector 0x10 is code, 0x18 data. ``long64`` also has ``cr3``, page tables in which virtual
    addresses are physical ones. Elsewhere ``mode`` is empty.
    """

    pc: int
    registers: Mapping[str, int] = field(default_factory=dict)
    mode: str = ""


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """Everything an engine needs to build a guest.

    ``on_end`` is called at most once, from any thread, when the guest ends by itself or the engine
    fails; it must return at once.
    """

    arch: str
    cpus: int
    memory: GuestMemory
    bus: AddressSpace
    controllers: tuple[Controller, ...]
    on_end: Callable[[GuestEnd], None]
    #: The MSI frame the engine provides; None for a machine without PCI.
    msi: MsiFrame | None = None
    #: The I/O port space; None for a board without one.
    ports: AddressSpace | None = None


class Guest(Protocol):
    """A guest living in an engine."""

    @property
    def fast_doorbells(self) -> bool:
        """Whether a write to a declared doorbell signals its eventfd without a call of the handler."""

    def irq_line(self, intr: IntrSpec) -> IrqLine:
        """The input line ``intr`` of one of the controllers; called at freeze only."""

    def signal_msi(self, address: int, data: int) -> None:
        """A device's message: ``data`` (32 bits) written to ``address``. Any thread, never blocks.

        The guest chose both, so what is not a line of the MSI frame is dropped.
        """

    def listen(self, fd: int, address: int, data: int) -> Callable[[], None] | None:
        """From now on every signal of the eventfd ``fd`` is that message, without a thread of ours.

        Also for a count that is in it now, which stays there. What comes back ends it: no message comes
        once it returns, and later counts stay in the eventfd; it is idempotent. None when this cannot be
        done, or not now, or the message is none. Any thread, never blocks.
        """

    def listen_level(self, intr: IntrSpec, fd: int, resample: int) -> Callable[[], None] | None:
        """A signal of ``fd`` raises a line until the guest has served it; ``resample`` is signalled then.

        The line is the wired-or of this and of :meth:`irq_line`'s. Else as :meth:`listen`.
        """

    def start(self, entry: CpuEntry) -> None:
        """Start the vCPU threads and return."""

    def stop(self, timeout: float) -> bool:
        """Stop every vCPU; idempotent. False when one did not stop within ``timeout`` seconds."""

    def pause(self, timeout: float) -> bool:
        """Hold every vCPU between two instructions until :meth:`resume`; not from a vCPU thread.

        False when one did not come to rest within ``timeout`` seconds; all run on then.
        """

    def resume(self) -> None:
        """Let the vCPUs run again; harmless when they do."""

    def registers(self) -> Sequence[Mapping[str, int]]:
        """The registers of each vCPU by name; meaningful when paused or stopped."""

    def status(self) -> Mapping[str, object]:
        """Counters for ``qvm`` status output; cheap, any thread."""

    def close(self) -> None:
        """Release the engine's resources after :meth:`stop`; idempotent."""


class Engine(Protocol):
    """A kind of engine, offered by a plugin through ``qvm_engines``."""

    name: ClassVar[str]
    #: Whether guests run on the host's own CPU, at its speed; ``engine = "auto"`` prefers such an engine.
    native: ClassVar[bool]

    def unusable(self, arch: str) -> str:
        """Why this engine cannot run a guest of ``arch`` here, and what to do; empty when it can."""

    def create_guest(self, config: GuestConfig) -> Guest:
        """Build a guest. Raises EngineError with the reason when that is impossible."""
