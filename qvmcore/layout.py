"""The layout of a machine (floor 8): who is at which address and on which interrupt.

One description for the checks of a VM file, for ``qvm show`` and for the device tree. The windows
of a vdev follow one another from its ``loc``; its interrupts count up from its ``intr``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qvmcore.boards import Board, PciHost
from qvmcore.engine import Controller
from qvmcore.pci.ports import CONFIG_PORTS
from qvmcore.types import IntrSpec, MachineSpec, MemorySpec, VdevSpec, Window
from qvmcore.vdev import Vdev


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """A range of the guest-physical address space, or of I/O ports when ``space`` is ``io``.

    ``kind``: ram, rom, controller, pci or vdev.
    """

    start: int
    size: int
    kind: str
    owner: str
    spec: VdevSpec | None = None
    space: str = "mem"

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.start + self.size

    def overlaps(self, other: MemoryRow) -> bool:
        """Whether both share a byte, or a port."""
        return self.space == other.space and self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


@dataclass(frozen=True, slots=True)
class InterruptRow:
    """One interrupt line in use. ``trigger`` is ``edge`` or ``level``.

    ``automatic`` rows are the lines that PCI functions got without asking.
    """

    intr: IntrSpec
    owner: str
    trigger: str
    spec: VdevSpec
    automatic: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Memory map by address, port map by number, interrupt map by controller and number."""

    memory: tuple[MemoryRow, ...]
    ports: tuple[MemoryRow, ...]
    interrupts: tuple[InterruptRow, ...]


def place_windows(loc: int, windows: Iterable[Window]) -> list[tuple[int, int]]:
    """(address, size) of each window of a vdev at ``loc``: one directly behind the other."""
    placed = []
    for window in windows:
        placed.append((loc, window.size))
        loc += window.size
    return placed


def pci_routes(pci: PciHost, vdevs: Iterable[VdevSpec]) -> dict[int, IntrSpec]:
    """The interrupt line of each PCI device number that is taken.

    All functions of a device share ``INTA#``. The line is the ``intr`` of one of them, else one of
    the host's four, by the standard swizzle (device number modulo 4).
    """
    routes: dict[int, IntrSpec] = {}
    for spec in vdevs:
        if spec.pci is not None:
            automatic = pci.intx[spec.pci.device % len(pci.intx)]
            if spec.intr is not None or spec.pci.device not in routes:
                routes[spec.pci.device] = spec.intr or automatic
    return routes


def layout_of(
    board: Board,
    memory: Sequence[MemorySpec],
    vdevs: Sequence[VdevSpec],
    classes: Mapping[str, type[Vdev]],
    *,
    pci: bool = False,
) -> Layout:
    """The layout of vdevs whose classes are known (by type); others are left out.

    ``pci``: the machine has a PCI bus, so its windows and interrupts are taken.
    """
    rows = [MemoryRow(m.start, m.size, "rom" if m.rom else "ram", "rom" if m.rom else "ram") for m in memory]
    for controller in board.controllers:
        rows += [MemoryRow(base, size, "controller", controller.name) for base, size in controller.windows]
        rows += [
            MemoryRow(base, size, "controller", controller.name, space="io")
            for base, size in controller.ports
        ]
    lines = []
    if pci and board.pci is not None:
        rows += _pci_rows(board.pci, board.controllers)
        known = [spec for spec in vdevs if spec.type in classes and classes[spec.type].irqs]
        lines += _pci_lines(board.pci, known)
    for spec in vdevs:
        if spec.type not in classes or spec.pci is not None:
            continue
        cls = classes[spec.type].for_options(spec.options)
        if spec.loc is not None:
            placed = place_windows(spec.loc, cls.windows)
            rows += [MemoryRow(start, size, "vdev", spec.name, spec, spec.space) for start, size in placed]
        if spec.intr is not None:
            for index in range(cls.irqs):
                intr = IntrSpec(spec.intr.controller, spec.intr.number + index)
                lines.append(InterruptRow(intr, spec.name, cls.trigger.value, spec))
    rows.sort(key=lambda row: row.start)
    return Layout(
        tuple(row for row in rows if row.space == "mem"),
        tuple(row for row in rows if row.space == "io"),
        tuple(sorted(lines, key=lambda row: (row.intr.controller, row.intr.number))),
    )


def _pci_rows(pci: PciHost, controllers: Sequence[Controller]) -> list[MemoryRow]:
    narrow, wide = pci.apertures
    rows = [
        MemoryRow(*pci.ecam, "pci", "configuration"),
        MemoryRow(*narrow, "pci", "32-bit BARs"),
        MemoryRow(*wide, "pci", "64-bit BARs"),
    ]
    frame = (pci.msi.base, pci.msi.size)
    if not any(frame in controller.windows for controller in controllers):
        rows.append(MemoryRow(*frame, "controller", f"{pci.msi.controller} MSI frame"))
    if pci.config_ports is not None:
        rows.append(MemoryRow(pci.config_ports, CONFIG_PORTS.size, "pci", "configuration", space="io"))
    return rows


def _pci_lines(pci: PciHost, vdevs: Sequence[VdevSpec]) -> list[InterruptRow]:
    """One row per line of vdevs with interrupts: automatic ones are shared, those of an ``intr`` are not."""
    rows, shared = [], dict[IntrSpec, list[VdevSpec]]()
    own = {spec.pci.device for spec in vdevs if spec.pci is not None and spec.intr is not None}
    for spec in vdevs:
        if spec.pci is not None and spec.intr is not None:
            rows.append(InterruptRow(spec.intr, spec.name, "level", spec))
        elif spec.pci is not None and spec.pci.device not in own:
            shared.setdefault(pci.intx[spec.pci.device % len(pci.intx)], []).append(spec)
    for intr, users in shared.items():
        names = ", ".join(spec.name for spec in users)
        rows.append(InterruptRow(intr, names, "level", users[0], automatic=True))
    return rows


def layout(spec: MachineSpec, board: Board, classes: Mapping[str, type[Vdev]]) -> Layout:
    """The layout of a composed machine."""
    return layout_of(board, spec.memory, spec.vdevs, classes, pci=spec.pci)
