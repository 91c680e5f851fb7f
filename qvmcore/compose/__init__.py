"""From VM files and command line to one checked MachineSpec (floor 8).

:func:`compose` reads everything, applies the overrides and checks the machine as a whole; it
raises one ConfigError with every problem found. Nothing is opened but the VM files themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from qvmcore import boards
from qvmcore.boards import Board
from qvmcore.compose.checks import check_file, check_layout, check_memory
from qvmcore.compose.pci import assign_pci
from qvmcore.compose.sources import ARRAYS, Item, Problems, Table, apply_override, read_files
from qvmcore.compose.tables import (
    QNX_SECTIONS,
    LoadTable,
    MemoryTable,
    SafetyTable,
    SystemTable,
    array,
    check_name,
    read_table,
    section,
)
from qvmcore.compose.vdevs import VdevClasses, build_vdevs, named_tables
from qvmcore.errors import nearest
from qvmcore.types import LoadSpec, MachineSpec, MemorySpec, Source

_SECTIONS = ("system", "load", "safety", *ARRAYS)

__all__ = ["Plugins", "compose"]


class _Entry(Protocol):
    @property
    def problem(self) -> str: ...


class Plugins(VdevClasses, Protocol):
    """The part of the plugin host that composing needs."""

    def engine_names(self) -> Mapping[str, _Entry]:
        """The installed engines."""


def compose(
    files: Iterable[str | Path], overrides: Sequence[str], host: Plugins, *, guest: bool = True
) -> MachineSpec:
    """The machine that ``files`` (later ones win) and ``overrides`` (``key=value``) describe.

    Without a ``guest`` of our own the vdevs are all that counts: board, memory and kernel may be missing,
    addresses and interrupts mean nothing, and no board adds vdevs. Raises ConfigError with all problems.
    """
    paths = [Path(file) for file in files]
    problems = Problems()
    root = read_files(paths, problems)
    # Without the whole text every further finding would be a guess.
    problems.raise_if_any()
    _override(root, overrides, problems)
    _check_sections(root, problems)

    table = section(root, "system", problems)
    system = read_table(SystemTable, table, "system", problems) or SystemTable()
    board = _board(system.board, table, problems) if guest or system.board else None
    if guest:
        _check_engine(system.engine, table, host, problems)
    name = system.name or (paths[0].stem if paths else "qvm-guest")
    if system.name:
        check_name(name, table, "system", problems)
    if board is not None and system.cpus > board.max_cpus:
        text = f"cpus: expected at most {board.max_cpus} on {board.name}, not {system.cpus}"
        problems.add(table.source_of("cpus"), "system", text)

    memory = _memory(root, system, table, board, problems) if guest else []
    load = _load(root, problems) if guest else LoadSpec()
    safety = read_table(SafetyTable, section(root, "safety", problems), "safety", problems) or SafetyTable()
    vdevs, classes = build_vdevs(array(root, "vdev", problems), board, host, problems)
    pci = False
    if not guest:
        vdevs = [spec for spec in vdevs if not spec.implicit]
    elif board is not None:
        vdevs = assign_pci(board, vdevs, classes, problems)
        pci = system.pci or any(spec.pci is not None for spec in vdevs)
        if system.pci and board.pci is None:
            problems.add(table.source_of("pci"), "system", f"pci: {board.name} has no PCI bus")
        check_memory(memory, board, problems)
        check_layout(board, memory, vdevs, classes, problems, pci=pci)
    problems.raise_if_any()
    return MachineSpec(
        name=name,
        board=system.board,
        engine=system.engine,
        cpus=system.cpus,
        memory=tuple(spec for spec, _ in memory),
        load=load,
        vdevs=tuple(vdevs),
        unsupported=system.unsupported,
        shutdown_timeout=system.shutdown_timeout,
        dump_dir=system.dump,
        source=root.source,
        base_dir=root.base_dir.absolute(),
        pci=pci,
        require_quiesce=safety.require_quiesce,
    )


def _override(root: Table, overrides: Sequence[str], problems: Problems) -> None:
    for text in overrides:
        # Names are looked up again each time: an override may itself change one.
        tables = array(root, "vdev", Problems())
        board = _known_board(root)
        wanted = text.partition("=")[0].split(".")
        implicit = {each.name: each for each in board.implicit} if board else {}
        if wanted[0].strip() == "vdev" and len(wanted) > 2 and wanted[1] in implicit:
            tables = _list_implicit(root, tables, implicit[wanted[1]].type, wanted[1], text, board)
        apply_override(root, text, named_tables(tables, board), problems)


def _list_implicit(
    root: Table, tables: list[Table], vdev_type: str, name: str, text: str, board: Board | None
) -> list[Table]:
    """Give an implicit vdev a table of its own, so that its keys can be set."""
    if name in named_tables(tables, board):
        return tables
    source = Source(f"command line: --set {text}")
    table = Table(source, Path.cwd())
    table.items["type"] = Item(vdev_type, source, Path.cwd())
    table.items["name"] = Item(name, source, Path.cwd())
    root.items["vdev"] = Item([*tables, table], source, Path.cwd())
    return [*tables, table]


def _check_sections(root: Table, problems: Problems) -> None:
    for key, item in root.items.items():
        if key in _SECTIONS:
            continue
        if key in QNX_SECTIONS:
            wrong, hint = QNX_SECTIONS[key]
            problems.add(item.source, "", f"[{key}]: {wrong}", hint)
        elif isinstance(item.value, Table | list):
            known = ", ".join(_SECTIONS)
            problems.add(
                item.source, "", f"unknown table {key!r}", nearest(key, _SECTIONS) or f"known tables: {known}"
            )
        else:
            hint = _home_of(key)
            problems.add(item.source, "", f"unknown key {key!r} outside of any table", hint)


def _home_of(key: str) -> str:
    spelt = key.replace("_", "-")
    for name, cls in (("system", SystemTable), ("load", LoadTable), ("safety", SafetyTable)):
        if spelt in cls.__struct_encode_fields__:
            return f"write it under [{name}]"
    return nearest(key, [*_SECTIONS, "include"])


def _known_board(root: Table) -> Board | None:
    table = root.get("system")
    name = table.get("board") if isinstance(table, Table) else None
    return boards.get(str(name)) if name in boards.names() else None


def _board(name: str, table: Table, problems: Problems) -> Board | None:
    known = ", ".join(boards.names())
    if not name:
        if table.get("board") is None:
            problems.add(table.source, "system", "missing key 'board'", f"known boards: {known}")
        return None
    if name not in boards.names():
        hint = nearest(name, boards.names()) or f"known boards: {known}"
        problems.add(table.source_of("board"), "system", f"unknown board {name!r}", hint)
        return None
    return boards.get(name)


def _check_engine(name: str, table: Table, host: Plugins, problems: Problems) -> None:
    engines = host.engine_names()
    if name == "auto":
        return
    at = table.source_of("engine")
    if name not in engines:
        known = ", ".join(["auto", *engines])
        hint = nearest(name, ["auto", *engines]) or f"known engines: {known}"
        problems.add(at, "system", f"unknown engine {name!r}", hint)
    elif engines[name].problem:
        problems.add(at, "system", f"engine {name!r} cannot be used: {engines[name].problem}")


def _memory(
    root: Table, system: SystemTable, table: Table, board: Board | None, problems: Problems
) -> list[tuple[MemorySpec, Source]]:
    """Guest memory with the place each range was written at."""
    base = board.ram(0)[0].start if board else 0
    ranges: list[tuple[MemorySpec, Source]] = []
    if system.ram is not None:
        wanted = board.ram(system.ram) if board else (MemorySpec(base, system.ram),)
        ranges += [(spec, table.source_of("ram")) for spec in wanted]
    for kind in ("ram", "rom"):
        for index, each in enumerate(array(root, kind, problems)):
            parsed = read_table(MemoryTable, each, f"{kind}[{index}]", problems)
            if parsed is not None:
                behind = max((spec.end for spec, _ in ranges), default=base)
                start = parsed.start if parsed.start is not None else behind
                ranges.append((MemorySpec(start, parsed.size, rom=kind == "rom"), each.source))
    if table.get("ram") is None and not array(root, "ram", Problems()):
        problems.add(table.source, "system", "the machine has no memory", 'write ram = "512M"')
    return sorted(ranges, key=lambda pair: pair[0].start)


def _load(root: Table, problems: Problems) -> LoadSpec:
    table = section(root, "load", problems)
    load = read_table(LoadTable, table, "load", problems) or LoadTable()
    if table.get("kernel") is None:
        problems.add(table.source, "load", "missing key 'kernel'", 'write kernel = "Image" under [load]')
    if "\0" in load.cmdline:
        problems.add(table.source_of("cmdline"), "load", "cmdline: a NUL character cannot be in it")
    for key, path in (("kernel", load.kernel), ("initrd", load.initrd)):
        if path is not None:
            check_file(path, key, table.source_of(key), problems)
    return LoadSpec(load.kernel, load.initrd, load.cmdline, load.format, load.address, load.mode or "")
