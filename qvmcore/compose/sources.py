"""VM files as one merged tree in which every key knows where it was written (floor 8).

``include = ["base.toml"]`` reads other files first; later text wins: tables merge key by key,
arrays of tables append, and a ``[[vdev]]`` with the same ``name`` as an earlier file's changes the
keys it gives and keeps the others. A file that is reached twice is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvmcore.errors import ConfigError, Diagnostic, nearest
from qvmcore.options import CommandLineText
from qvmcore.toml_source import Place, TomlSource, read_toml
from qvmcore.types import Source

#: The tables of a VM file that may be given many times.
ARRAYS = ("vdev", "ram", "rom")


class Problems:
    """Collects everything wrong, so that all of it is reported at once."""

    def __init__(self) -> None:
        self.found: list[Diagnostic] = []

    def add(self, source: Source, where: str, message: str, hint: str = "") -> None:
        """Note one problem; repeating it does nothing."""
        problem = Diagnostic(source.file, source.line, where, message, hint)
        if problem not in self.found:
            self.found.append(problem)

    def raise_if_any(self) -> None:
        """Raise ConfigError with all problems: file by file, in the order of lines."""
        if self.found:
            files = list(dict.fromkeys(problem.file for problem in self.found))
            raise ConfigError(sorted(self.found, key=lambda p: (files.index(p.file), p.line)))


@dataclass(slots=True)
class Item:
    """A value, where it was written, and the directory its relative paths start from.

    ``value`` is a plain TOML value, a Table, or a list of Tables.
    """

    value: Any
    source: Source
    base_dir: Path


@dataclass(slots=True)
class Table:
    """A table of a VM file. ``source`` is its header."""

    source: Source
    base_dir: Path
    items: dict[str, Item] = field(default_factory=dict)

    def spelling(self, key: str) -> str:
        """How this table spells ``key``, if it has it: ``-`` and ``_`` mean the same."""
        wanted = key.replace("-", "_")
        return next((have for have in self.items if have.replace("-", "_") == wanted), key)

    def get(self, key: str) -> Any:
        """The value of ``key``, or None."""
        item = self.items.get(self.spelling(key))
        return None if item is None else item.value

    def source_of(self, key: str) -> Source:
        """Where ``key`` was written, or the table when it was not."""
        item = self.items.get(self.spelling(key))
        return self.source if item is None else item.source

    def base_dir_of(self, key: str) -> Path:
        """Where a relative path in ``key`` starts."""
        item = self.items.get(self.spelling(key))
        return self.base_dir if item is None else item.base_dir

    def plain(self, skip: Iterable[str] = ()) -> dict[str, object]:
        """The values as a plain dictionary, without the keys in ``skip``."""
        skipped = {self.spelling(key) for key in skip}
        return {key: _plain(item.value) for key, item in self.items.items() if key not in skipped}


def read_files(files: Sequence[Path], problems: Problems) -> Table:
    """All files with their includes merged into one tree."""
    reader = _Reader(problems)
    first = str(files[0]) if files else "command line"
    merged = Table(Source(first), files[0].parent if files else Path.cwd())
    for path in files:
        merge(merged, reader.read(path, str(path), (), None))
    return merged


def merge(base: Table, top: Table) -> None:
    """Put ``top`` over ``base``."""
    for key, item in top.items.items():
        key = base.spelling(key)
        have = base.items.get(key)
        if have is not None and isinstance(have.value, Table) and isinstance(item.value, Table):
            merge(have.value, item.value)
        elif have is not None and _is_array(have.value) and _is_array(item.value):
            have.value = _merge_array(have.value, item.value)
        else:
            base.items[key] = item


def _merge_array(base: list[Table], top: list[Table]) -> list[Table]:
    result = list(base)
    named = {table.get("name"): table for table in base if table.get("name") is not None}
    for table in top:
        earlier = named.get(table.get("name"))
        if earlier is None:
            result.append(table)
        else:
            merge(earlier, table)
    return result


def apply_override(root: Table, text: str, names: Mapping[str, Table], problems: Problems) -> None:
    """Apply ``SECTION.KEY=VALUE`` of the command line.

    ``names`` are the vdevs by name; ``vdev.NAME.key`` and ``vdev.INDEX.key`` reach them.
    """
    source = Source(f"command line: --set {text}")
    place, equals, value = text.partition("=")
    section, dot, key = place.strip().partition(".")
    if not equals or not dot or not key:
        problems.add(source, "", "expected SECTION.KEY=VALUE", "for example --set system.ram=1G")
        return
    table: Table | None
    if section in ARRAYS:
        index, dot, key = key.partition(".")
        if not dot or not key:
            example = "hostdev=disk.img" if section == "vdev" else "size=64M"
            expected = f"expected {section}.{'NAME' if section == 'vdev' else 'INDEX'}.KEY=VALUE"
            problems.add(source, "", expected, f"for example --set {section}.0.{example}")
            return
        table = _array_element(root, section, index, names)
        if table is None:
            known = [*names] if section == "vdev" else []
            hint = nearest(index, known) or (f"there are: {', '.join(known)}" if known else "")
            problems.add(source, "", f"there is no {section} {index!r}", hint)
            return
    else:
        item = root.items.setdefault(section, Item(Table(source, Path.cwd()), source, Path.cwd()))
        if not isinstance(item.value, Table):
            problems.add(source, "", f"{section!r} is not a table")
            return
        table = item.value
    table.items[table.spelling(key)] = Item(CommandLineText(value), source, Path.cwd())


def _array_element(root: Table, section: str, index: str, names: Mapping[str, Table]) -> Table | None:
    if section == "vdev" and index in names:
        return names[index]
    tables = root.get(section)
    if index.isdecimal() and _is_array(tables) and int(index) < len(tables):
        element: Table = tables[int(index)]
        return element
    return None


class _Reader:
    """Reads files and their includes, each once."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._done: set[Path] = set()

    def read(self, path: Path, shown: str, chain: tuple[tuple[Path, str], ...], by: Source | None) -> Table:
        """The tree of one file over its includes; ``by`` is the include key that names it."""
        table = Table(Source(shown), path.parent.absolute())
        try:
            real = path.resolve(strict=True)
            if real in [known for known, _ in chain]:
                way = " -> ".join([*(name for _, name in chain), shown])
                self._problems.add(by or Source(shown), "include", f"cyclic include: {way}")
                return table
            if real in self._done:
                return table
            self._done.add(real)
            source = read_toml(path, shown)
        except ConfigError as error:
            self._problems.found += error.diagnostics
            return table
        except (OSError, RuntimeError) as error:
            # RuntimeError: resolve() reports a loop of symbolic links so before Python 3.13.
            reason = getattr(error, "strerror", None) or str(error)
            where, named = ("include", f" {shown}") if by else ("", "")
            self._problems.add(by or Source(shown), where, f"cannot read{named or ' the VM file'}: {reason}")
            return table
        own = _tree(source, shown)
        for name, at in self._includes(own):
            merge(table, self.read(own.base_dir / name, _beside(shown, name), (*chain, (real, shown)), at))
        own.items.pop("include", None)
        merge(table, own)
        return table

    def _includes(self, table: Table) -> list[tuple[str, Source]]:
        value, at = table.get("include"), table.source_of("include")
        names = [value] if isinstance(value, str) else value
        if names is None:
            return []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            self._problems.add(at, "include", 'expected a list of files such as ["base.toml"]')
            return []
        return [(name, at) for name in names]


def _beside(shown: str, name: str) -> str:
    return str(Path(shown).parent / name)


def _tree(source: TomlSource, shown: str) -> Table:
    base_dir = source.path.parent.absolute()

    def convert(value: Any, place: Place) -> Any:
        if isinstance(value, Mapping):
            line = source.lines.get(place, 0)
            table = Table(Source(shown, line), base_dir)
            for key, item in value.items():
                inner = (*place, key)
                at = Source(shown, source.lines.get(inner, line))
                table.items[key] = Item(convert(item, inner), at, base_dir)
            return table
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            return [convert(item, (*place, index)) for index, item in enumerate(value)]
        return value

    root: Table = convert(source.data, ())
    return root


def _is_array(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Table)


def _plain(value: Any) -> Any:
    if isinstance(value, Table):
        return value.plain()
    if _is_array(value):
        return [table.plain() for table in value]
    return value
