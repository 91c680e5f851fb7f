"""Boards (floor 8): the fixed part of a machine. :func:`get` gives one by its name.

A board knows its memory layout, its interrupt controllers, the vdevs it always has, and how a
guest of its kind is loaded and told about all that (a device tree, ACPI).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qvmcore.acpi import AcpiTables
from qvmcore.engine import Controller, CpuEntry, MsiFrame
from qvmcore.memory import GuestMemory
from qvmcore.types import IntrSpec, MachineSpec, MemorySpec, VdevSpec
from qvmcore.vdev import Vdev


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the loader put things: guest-physical addresses in bytes.

    ``initrd`` is (start, end), or None without one; ``dtb`` is where the device tree will be.
    """

    kernel: int
    entry: int
    dtb: int
    initrd: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class DescribedVdev:
    """A vdev together with its table: what a board announces to the guest."""

    spec: VdevSpec
    vdev: Vdev


@dataclass(frozen=True, slots=True)
class ImplicitVdev:
    """A vdev the board has even when no VM file lists it; a file may list it to change its keys."""

    type: str
    name: str
    loc: int
    intr: IntrSpec | None
    #: Options it has unless a listed vdev claims the same things of the host (its terminal).
    options: Mapping[str, object] = field(default_factory=dict)
    #: What ``loc`` counts in: ``mem`` or ``io``.
    space: str = "mem"


@dataclass(frozen=True, slots=True)
class PciHost:
    """Where PCI bus 0 is on a board that can have one.

    ``ecam`` is the (base, size) of the configuration window, ``apertures`` the (base, size) ranges
    BARs live in: 32-bit first, 64-bit second. ``intx`` are the lines of the four INTx pins;
    ``msi`` is where messages go. ``config_ports`` is the first of the eight I/O ports of PCI's older
    configuration mechanism, for a board that has it.
    """

    ecam: tuple[int, int]
    apertures: tuple[tuple[int, int], tuple[int, int]]
    intx: tuple[IntrSpec, IntrSpec, IntrSpec, IntrSpec]
    msi: MsiFrame
    config_ports: int | None = None


class Board(Protocol):
    """What the core asks of a board. All addresses and sizes are bytes."""

    @property
    def name(self) -> str:
        """What ``board = "..."`` calls it."""

    @property
    def arch(self) -> str:
        """Architecture of the guest, e.g. ``aarch64``; engines and loaders go by it."""

    @property
    def summary(self) -> str:
        """One line for people."""

    def ram(self, size: int) -> tuple[MemorySpec, ...]:
        """The ranges that ``ram = "512M"`` means, the first address first."""

    @property
    def port_space(self) -> int:
        """How many I/O ports there are; 0 for a board without port I/O."""

    @property
    def address_limit(self) -> int:
        """First address behind the guest-physical address space."""

    @property
    def max_cpus(self) -> int:
        """The most vCPUs the interrupt controller serves."""

    @property
    def controllers(self) -> tuple[Controller, ...]:
        """The interrupt controllers, provided by the engine."""

    @property
    def pci(self) -> PciHost | None:
        """Its PCI bus, which a machine has when a vdev is on it; None when the board cannot."""

    @property
    def implicit(self) -> tuple[ImplicitVdev, ...]:
        """The vdevs every machine of this board has."""

    @property
    def vdev_space(self) -> range:
        """Addresses suggested to people for their vdevs; step = distance of two vdevs."""

    @property
    def vdev_lines(self) -> range:
        """Interrupt numbers suggested to people for their vdevs."""

    def build_fdt(
        self, spec: MachineSpec, vdevs: Sequence[DescribedVdev], placement: Placement | None = None
    ) -> bytes:
        """The device tree blob of the whole machine; ``placement`` None = nothing loaded.

        Raises QvmError on a board that is not described by a device tree.
        """

    def build_acpi(self, spec: MachineSpec, vdevs: Sequence[DescribedVdev]) -> AcpiTables:
        """The ACPI tables of the whole machine.

        Raises QvmError on a board that is not described by ACPI, or when the tables are too large.
        """

    def load(self, spec: MachineSpec, vdevs: Sequence[DescribedVdev], memory: GuestMemory) -> CpuEntry:
        """Place what ``spec.load`` names, and the tables that describe the machine.

        Raises HostError for a file that cannot be read, QvmError for one that does not fit.
        """


def _arm64_virt() -> Board:
    from qvmcore.boards.arm64_virt import Arm64Virt

    return Arm64Virt()


def _x86_64_pc() -> Board:
    from qvmcore.boards.x86_64_pc import X86Pc

    return X86Pc()


_BOARDS: Mapping[str, Callable[[], Board]] = {"arm64-virt": _arm64_virt, "x86_64-pc": _x86_64_pc}


def names() -> tuple[str, ...]:
    """The names of all boards."""
    return tuple(_BOARDS)


def get(name: str) -> Board:
    """The board called ``name``. Raises KeyError; check against :func:`names` first."""
    return _BOARDS[name]()
