"""Checks of a composed machine as a whole (floor 8): addresses, interrupts, memory, files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from qvmcore.boards import Board
from qvmcore.compose.pci import can_be_pci
from qvmcore.compose.sources import Problems
from qvmcore.errors import nearest
from qvmcore.layout import InterruptRow, Layout, MemoryRow, layout_of
from qvmcore.options import format_size
from qvmcore.types import IntrSpec, MemorySpec, Source, VdevSpec
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev

PAGE = 4096
#: Registers are up to eight bytes wide and must not be split by an odd base address.
_LOC_ALIGNMENT = 8


def host_memory() -> int:
    """RAM of this host in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(memory: Sequence[tuple[MemorySpec, Source]], board: Board, problems: Problems) -> None:
    """Sizes, page boundaries, and that the host has as much."""
    for spec, source in memory:
        kind = "rom" if spec.rom else "ram"
        if spec.size == 0:
            problems.add(source, kind, "the size is 0", 'write for example ram = "512M"')
        elif spec.size % PAGE or spec.start % PAGE:
            text = f"[{spec.start:#x}, +{spec.size:#x}) does not begin and end on a page (4096 bytes)"
            problems.add(source, kind, text)
        if spec.end > board.address_limit:
            limit = format_size(board.address_limit)
            problems.add(source, kind, f"ends behind the address space of {board.name} ({limit})")
    total, have = sum(spec.size for spec, _ in memory), host_memory()
    if total > have:
        text = f"{format_size(total)} of guest memory is more than this host has ({format_size(have)})"
        problems.add(memory[-1][1], "ram", text)


def check_layout(
    board: Board,
    memory: Sequence[tuple[MemorySpec, Source]],
    vdevs: Sequence[VdevSpec],
    classes: Mapping[str, type[Vdev]],
    problems: Problems,
    *,
    pci: bool = False,
) -> None:
    """Places and interrupts: missing, outside, clashing. ``pci``: the machine has a PCI bus."""
    layout = layout_of(board, [spec for spec, _ in memory], vdevs, classes, pci=pci)
    free = _Free(board, layout)
    for spec in vdevs:
        cls = classes[spec.type].for_options(spec.options)
        _check_loc(spec, cls, board, free, problems)
        _check_intr(spec, cls, board, free, problems, pci=pci)
    sources = {(spec.start, spec.size): source for spec, source in memory}
    for rows in (layout.memory, layout.ports):
        for first, second in combinations(rows, 2):
            if first.overlaps(second):
                _report_overlap(first, second, sources, problems)
    for one, other in combinations(layout.interrupts, 2):
        if one.intr == other.intr:
            _report_interrupt_clash(one, other, problems)


def check_file(path: Path, key: str, source: Source, problems: Problems) -> None:
    """A file of ``[load]`` must be there and readable."""
    try:
        with path.open("rb"):
            pass
    except IsADirectoryError:
        problems.add(source, "load", f"{key}: {path} is a directory, not a file")
    except OSError as error:
        problems.add(source, "load", f"{key}: cannot read {path}: {error.strerror or error}")


class _Free:
    """Suggests free places, each only once."""

    def __init__(self, board: Board, layout: Layout) -> None:
        self._board = board
        self._rows = list(layout.memory)
        self._lines = {row.intr for row in layout.interrupts}

    def loc(self, size: int) -> str:
        for base in self._board.vdev_space:
            row = MemoryRow(base, size, "vdev", "")
            if not any(row.overlaps(other) for other in self._rows):
                self._rows.append(row)
                return f"{base:#x}"
        return "ADDRESS"

    def intr(self, count: int) -> str:
        name = self._board.controllers[0].name
        for number in self._board.vdev_lines:
            wanted = {IntrSpec(name, number + index) for index in range(count)}
            if not wanted & self._lines:
                self._lines |= wanted
                return f"{name}:{number}"
        return "CONTROLLER:NUMBER"


def _key_source(spec: VdevSpec, key: str) -> Source:
    return spec.key_sources.get(key, spec.source)


def _check_loc(spec: VdevSpec, cls: type[Vdev], board: Board, free: _Free, problems: Problems) -> None:
    size = sum(window.size for window in cls.windows)
    at = _key_source(spec, "loc")
    if spec.pci is not None or (spec.loc is None and can_be_pci(cls) and board.pci is not None):
        return
    if spec.loc is None:
        if size:
            text = "missing key 'loc': this vdev is not a PCI device, so it needs an address"
            problems.add(at, spec.where, text, f"write loc = {free.loc(size)}")
    elif not size:
        problems.add(at, spec.where, "loc: this vdev has no registers", "remove loc")
    elif spec.space == "io":
        _check_port(spec, cls, size, board, problems)
    elif spec.loc % _LOC_ALIGNMENT:
        problems.add(at, spec.where, f"loc: {spec.loc:#x} is not a multiple of {_LOC_ALIGNMENT}")
    elif spec.loc + size > board.address_limit:
        text = f"loc: {spec.loc:#x} is behind the address space of {board.name}"
        problems.add(at, spec.where, text, f"addresses end at {board.address_limit:#x}")


def _check_port(spec: VdevSpec, cls: type[Vdev], size: int, board: Board, problems: Problems) -> None:
    at, free = _key_source(spec, "loc"), f"loc = {board.vdev_space.start:#x}"
    assert spec.loc is not None
    if not board.port_space:
        text = f"loc: io:{spec.loc:#x} is an I/O port, and {board.name} has none"
        problems.add(at, spec.where, text, f"write a memory address such as {free}")
    elif issubclass(cls, VirtioVdev):
        text = f"loc: io:{spec.loc:#x} is an I/O port; virtio devices are in memory or on PCI"
        problems.add(at, spec.where, text, f"write {free}, or leave loc out for PCI")
    elif spec.loc + size > board.port_space:
        text = f"loc: io:{spec.loc:#x} with {size} ports ends behind the last port"
        problems.add(at, spec.where, text, f"ports end at {board.port_space - 1:#x}")


def _check_intr(
    spec: VdevSpec, cls: type[Vdev], board: Board, free: _Free, problems: Problems, *, pci: bool
) -> None:
    at = _key_source(spec, "intr")
    on_pci = spec.pci is not None or (spec.loc is None and can_be_pci(cls) and board.pci is not None)
    if spec.intr is None:
        if cls.irqs and not on_pci:
            text = "missing key 'intr': this vdev needs an interrupt"
            problems.add(at, spec.where, text, f'write intr = "{free.intr(cls.irqs)}"')
        return
    if not cls.irqs:
        problems.add(at, spec.where, "intr: this vdev has no interrupt", "remove intr")
        return
    controllers = {controller.name: controller for controller in board.controllers}
    controller = controllers.get(spec.intr.controller)
    known = ", ".join(name for name, each in controllers.items() if each.lines)
    if controller is None:
        text = f"intr: there is no interrupt controller {spec.intr.controller!r}"
        hint = nearest(spec.intr.controller, controllers) or f"{board.name} has {known}"
        problems.add(at, spec.where, text, hint)
        return
    if not controller.lines:
        text = f"intr: {controller.name} is the board's own and has no lines for vdevs"
        problems.add(at, spec.where, text, f"{board.name} has {known}")
        return
    lines = 1 if on_pci else cls.irqs
    last = spec.intr.number + lines - 1
    if spec.intr.number not in controller.lines or last not in controller.lines:
        needs = f" (the vdev needs {lines})" if lines > 1 else ""
        text = f"intr: {spec.intr} is out of range{needs}"
        hint = f"{controller.name} has {controller.lines.start} to {controller.lines.stop - 1} for vdevs"
        problems.add(at, spec.where, text, hint)
        return
    msi = board.pci.msi if pci and board.pci is not None else None
    if msi is None or msi.controller != controller.name or not msi.lines:
        return
    if spec.intr.number in msi.lines or last in msi.lines:
        text = f"intr: {spec.intr} belongs to PCI's message interrupts"
        used = f"{msi.controller}:{msi.lines.start} to {msi.controller}:{msi.lines.stop - 1}"
        hint = f'{used} are taken; write intr = "{free.intr(lines)}"'
        problems.add(at, spec.where, text, hint)


def _report_overlap(
    first: MemoryRow, second: MemoryRow, sources: Mapping[tuple[int, int], Source], problems: Problems
) -> None:
    # The problem belongs to what the user wrote last: a vdev of a file, else a memory range.
    blamed, other = (second, first) if _rank(second) >= _rank(first) else (first, second)
    if blamed.spec is not None:
        at, where = _key_source(blamed.spec, "loc"), blamed.spec.where
        subject = f"loc: {blamed}"
    else:
        at, where = sources.get((blamed.start, blamed.size), Source("<board>")), blamed.kind
        subject = f"{blamed}"
    if other.kind in ("ram", "rom"):
        verb = "is on" if blamed.kind == "vdev" else "overlaps"
        problems.add(at, where, f"{subject} {verb} {other.kind.upper()} {other}")
    elif other.kind == "pci":
        problems.add(at, where, f"{subject} overlaps PCI's window for {other.owner} {other}")
    elif other.kind == "controller":
        problems.add(at, where, f"{subject} overlaps the interrupt controller {other.owner} {other}")
    else:
        problems.add(at, where, f"{subject} overlaps {_owner(other.owner, other.spec)} {other}")


def _rank(row: MemoryRow) -> tuple[int, int]:
    if row.spec is not None and not row.spec.implicit:
        return (2, row.spec.source.line)
    return (1, 0) if row.kind in ("ram", "rom") else (0, 0)


def _owner(name: str, spec: VdevSpec | None) -> str:
    if spec is not None and spec.implicit:
        return f"the board's {name}"
    return f"{name} ({spec.source.file}:{spec.source.line})" if spec is not None else name


def _report_interrupt_clash(one: InterruptRow, other: InterruptRow, problems: Problems) -> None:
    later, earlier = (one, other) if _spec_rank(one.spec) >= _spec_rank(other.spec) else (other, one)
    if later.automatic:
        later, earlier = earlier, later
    text = f"intr: {later.intr} is already used by {_owner(earlier.owner, earlier.spec)}"
    if earlier.automatic:
        text = f"intr: {later.intr} is the PCI interrupt of {earlier.owner}"
    problems.add(_key_source(later.spec, "intr"), later.spec.where, text)


def _spec_rank(spec: VdevSpec) -> tuple[bool, int]:
    return (not spec.implicit, spec.source.line)
