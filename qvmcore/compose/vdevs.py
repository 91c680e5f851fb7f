"""The ``[[vdev]]`` tables, and the board's implicit vdevs, as VdevSpecs (floor 8)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from qvmcore.boards import Board, ImplicitVdev
from qvmcore.compose.sources import Problems, Table
from qvmcore.compose.tables import COMMON_KEYS, VdevTable, check_name, read_table, report
from qvmcore.errors import PluginError, nearest
from qvmcore.options import OptionProblem, convert_options, parse_number
from qvmcore.types import PciAddress, Source, VdevSpec
from qvmcore.vdev import Vdev


class VdevClasses(Protocol):
    """The part of the plugin host that knows vdev classes."""

    def vdev_class(self, vdev_type: str) -> type[Vdev]:
        """The class of a type. Raises PluginError."""


def named_tables(tables: Sequence[Table], board: Board | None) -> dict[str, Table]:
    """The tables by vdev name, with default names given: what ``--set vdev.NAME.key`` reaches."""
    named: dict[str, Table] = {}
    for name, table in zip(_names(tables, board), tables, strict=True):
        named.setdefault(name, table)
    return named


def _names(tables: Sequence[Table], board: Board | None) -> list[str]:
    """The name of each table: its own, that of the implicit vdev it stands for, or type and number."""
    claims = _claims(tables, board)
    counts: dict[str, int] = {}
    names = []
    for index, table in enumerate(tables):
        vdev_type = table.get("type")
        name = table.get("name") or (claims[index].name if index in claims else None)
        if not isinstance(name, str):
            number = counts[str(vdev_type)] = counts.get(str(vdev_type), -1) + 1
            name = f"{vdev_type}-{number}"
        names.append(str(name))
    return names


def build_vdevs(
    tables: Sequence[Table], board: Board | None, classes: VdevClasses, problems: Problems
) -> tuple[list[VdevSpec], dict[str, type[Vdev]]]:
    """All vdevs, implicit ones first, and the classes of their types; problems are collected."""
    builder = _Builder(classes, problems)
    claims = _claims(tables, board)
    listed = {claim.name for claim in claims.values()} | {table.get("name") for table in tables}
    # Listed ones first: what they claim of the host, an implicit one does without.
    explicit = [
        builder.explicit(index, table, name, claims.get(index))
        for index, (name, table) in enumerate(zip(_names(tables, board), tables, strict=True))
    ]
    implicit = [
        builder.implicit(each) for each in (board.implicit if board else ()) if each.name not in listed
    ]
    specs = [spec for spec in [*implicit, *explicit] if spec is not None]
    return specs, builder.known


def _claims(tables: Sequence[Table], board: Board | None) -> dict[int, ImplicitVdev]:
    """Which table (by index) takes the place of which implicit vdev: by name, else by type."""
    claims: dict[int, ImplicitVdev] = {}
    for implicit in board.implicit if board else ():
        same_name = [i for i, t in enumerate(tables) if t.get("name") == implicit.name]
        same_type = [i for i, t in enumerate(tables) if t.get("type") == implicit.type and i not in claims]
        for index in (same_name or same_type)[:1]:
            claims[index] = implicit
    return claims


class _Builder:
    """Makes the specs of one machine and remembers classes and names seen."""

    def __init__(self, classes: VdevClasses, problems: Problems) -> None:
        self.known: dict[str, type[Vdev]] = {}
        self._classes = classes
        self._problems = problems
        self._names: dict[str, Source] = {}
        self._claimed: dict[str, str] = {}

    def implicit(self, each: ImplicitVdev) -> VdevSpec | None:
        """A vdev that no file lists, with the board's options, or the defaults where these clash."""
        source = Source(f"board vdev {each.name}")
        cls = self._class(each.type, source, f"({each.type})")
        if cls is None:
            return None
        options, found = convert_options(cls.Options, each.options, Path.cwd())
        if not found and any(claim in self._claimed for claim in cls.claims(options)):
            options, found = convert_options(cls.Options, {}, Path.cwd())
        for problem in found:
            self._problems.add(source, f"({each.type})", problem.message, problem.hint)
        self._names[each.name] = source
        label = f"{each.name} ({each.type})"
        return VdevSpec(
            each.type, each.name, options, each.loc, each.intr,
            implicit=True, source=source, label=label, base_dir=Path.cwd(), space=each.space,
        )  # fmt: skip

    def explicit(self, index: int, table: Table, name: str, claim: ImplicitVdev | None) -> VdevSpec | None:
        """The vdev of one table; None when it is too wrong for further checks."""
        vdev_type = table.get("type") or (claim.type if claim else None)
        where = f"vdev[{index}] ({vdev_type})" if vdev_type else f"vdev[{index}]"
        own_keys = [key for key in table.items if key.replace("-", "_") not in _COMMON]
        place = _special_place(table.get("loc"))
        pci: PciAddress | None = None
        port: int | None = None
        try:
            if place.startswith("pci:"):
                pci = PciAddress.parse(place)
            elif place:
                port = parse_number(place.removeprefix("io:"))
        except ValueError as error:
            self._problems.add(table.source_of("loc"), where, f"loc: {error}")
        skipped = [*own_keys, "loc"] if place else own_keys
        common = read_table(VdevTable, table, where, self._problems, skipped)
        if common is None or not isinstance(vdev_type, str):
            if vdev_type is None:
                self._problems.add(table.source, where, "missing key 'type'", "qvm vdev lists the types")
            return None
        self._check_name(name, table, where)
        cls = self._class(vdev_type, table.source_of("type"), where)
        if cls is None:
            return None
        same_kind = claim is not None and claim.type == vdev_type
        loc: int | None = common.loc if port is None else port
        space = "io" if port is not None else _space_of(table.get("loc"), cls)
        if loc is None and not place and claim and same_kind:
            loc, space = claim.loc, claim.space
        return VdevSpec(
            type=vdev_type,
            name=name,
            options=self._options(cls, table, where),
            loc=loc,
            space=space,
            pci=pci,
            intr=claim.intr if common.intr is None and claim and same_kind else common.intr,
            on_fault=common.on_fault,
            source=table.source,
            key_sources={key: item.source for key, item in table.items.items()},
            label=where,
            base_dir=table.base_dir_of("hostdev"),
        )

    def _options(self, cls: type[Vdev], table: Table, where: str) -> object:
        directories = {key: item.base_dir for key, item in table.items.items()}
        values = table.plain(COMMON_KEYS)
        options, found = convert_options(cls.Options, values, table.base_dir, base_dirs=directories)
        known = [*_own_keys(cls), *COMMON_KEYS]
        report([_with_common_hint(problem, known) for problem in found], table, where, self._problems)
        for claim in cls.claims(options) if options is not None else ():
            earlier = self._claimed.setdefault(claim, where)
            if earlier != where:
                self._problems.add(table.source, where, f"{claim} is already used by {earlier}")
        return options

    def _check_name(self, name: str, table: Table, where: str) -> None:
        check_name(name, table, where, self._problems)
        earlier = self._names.get(name)
        if earlier is not None:
            place = f"{earlier.file}:{earlier.line}" if earlier.line else earlier.file
            self._problems.add(table.source_of("name"), where, f"name {name!r} is already used at {place}")
        self._names.setdefault(name, table.source)

    def _class(self, vdev_type: str, source: Source, where: str) -> type[Vdev] | None:
        if vdev_type not in self.known:
            try:
                self.known[vdev_type] = self._classes.vdev_class(vdev_type)
            except PluginError as error:
                self._problems.add(source, where, error.message, error.hint)
                return None
        return self.known[vdev_type]


def _special_place(loc: object) -> str:
    """A ``loc`` that is no memory address, ``pci:...`` or ``io:...``; else an empty text."""
    text = loc.strip() if isinstance(loc, str) else ""
    return text if text.startswith(("pci:", "io:")) else ""


def _space_of(loc: object, cls: type[Vdev]) -> str:
    """The space of a ``loc`` that is a number: the class's own, unless it says ``mem:``."""
    return "mem" if isinstance(loc, str) and loc.strip().startswith("mem:") else cls.space


_COMMON = frozenset(key.replace("-", "_") for key in COMMON_KEYS)
_UNKNOWN = re.compile(r"unknown key '(.*)'")


def _own_keys(cls: type[Vdev]) -> Iterable[str]:
    return cls.Options.__struct_encode_fields__


def _with_common_hint(problem: OptionProblem, known: Sequence[str]) -> OptionProblem:
    """A misspelt common key (``lok``) is found too, not only a misspelt option."""
    if not _UNKNOWN.fullmatch(problem.message):
        return problem
    hint = nearest(problem.key, known) or f"known keys: {', '.join(known)}"
    return OptionProblem(problem.key, problem.message, hint)
