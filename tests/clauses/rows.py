"""The clause matrix: rows from ``clauses/*.toml``, and the document made of them.

A row is one MUST or MUST NOT for devices of the virtio 1.4 standard, in words of our own, with the
tests that show it. Rows are numbered within their section in the order of the standard; ``clauses``
of a section is how many there are, so none can be left out unnoticed. A section that is about a
feature qvm does not offer has a ``note`` that says so, and no rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "virtio-clauses.md"
ROWS = Path(__file__).with_name("clauses")

#: What a test, or all tests of a row together, may come to; the worst one counts.
OUTCOMES = ("FAILED", "passed", "skipped", "not run")
_ABSENT = "not covered"
_FOREIGN = "not applicable"

_HEAD = """\
# Virtio 1.4, clause by clause

Generated: `./bootstrap test --clauses` writes this file from `tests/clauses/clauses/*.toml` and the
outcomes of that run. Do not edit it.

A row is one MUST or MUST NOT that binds devices, in the order of its section, for the chapters qvm
implements: virtio 1.4, OASIS committee specification 01 (tag `virtio-v1.4-cs01`). The requirement is a
paraphrase; the standard is what counts. SHOULD and MAY are not listed, neither are requirements for
drivers.

* **passed**, **FAILED**, **skipped**, **not run**: the outcome of the tests named, all of their
  parameters together; the worst one counts.
* **not covered**: it binds qvm's devices, and no test shows that they keep it.
* **not applicable**: it is about something qvm's devices do not offer or do not have.
"""


@dataclass(frozen=True)
class Clause:
    """One requirement. ``tests`` are ``name``, ``Class::name`` or ``path/file.py::name``."""

    id: str
    kind: str
    says: str
    tests: tuple[str, ...] = ()
    note: str = ""
    applies: bool = True


@dataclass(frozen=True)
class Section:
    """A section of the standard with ``clauses`` requirements; ``note`` stands for all rows of it."""

    id: str
    title: str
    clauses: int
    rows: tuple[Clause, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Chapter:
    """One file: what belongs together in the document."""

    title: str
    sections: tuple[Section, ...]

    @property
    def rows(self) -> Iterator[Clause]:
        """Every row."""
        return (row for section in self.sections for row in section.rows)


def load(folder: Path = ROWS) -> list[Chapter]:
    """The chapters in the order of their files. KeyError or TypeError when a file is malformed."""
    return [_chapter(tomli.loads(path.read_text())) for path in sorted(folder.glob("*.toml"))]


def _chapter(table: Mapping[str, Any]) -> Chapter:
    sections = []
    for item in table["section"]:
        fields = dict(item)
        rows = tuple(
            Clause(**{**row, "tests": tuple(row.get("tests", ()))}) for row in fields.pop("clause", ())
        )
        sections.append(Section(**fields, rows=rows))
    return Chapter(table["title"], tuple(sections))


def problems(chapters: Iterable[Chapter]) -> Iterator[str]:
    """What is wrong with the rows, one sentence each."""
    seen = Counter(section.id for chapter in chapters for section in chapter.sections)
    yield from (f"{section}: listed {count} times" for section, count in seen.items() if count > 1)
    for chapter in chapters:
        for section in chapter.sections:
            wanted = [] if section.note else [f"{section.id}/{n}" for n in range(1, section.clauses + 1)]
            found = [row.id for row in section.rows]
            if found != wanted:
                yield f"{section.id}: rows {found}, wanted {wanted}"
        for row in chapter.rows:
            if row.kind not in ("MUST", "MUST NOT"):
                yield f"{row.id}: kind is {row.kind!r}"
            if not row.says or "|" in row.says + row.note:
                yield f"{row.id}: says nothing, or holds a bar"
            if row.tests and not row.applies:
                yield f"{row.id}: has tests although it does not apply"
            if not row.applies and not row.note:
                yield f"{row.id}: does not apply, but nothing says why"
            if len(set(row.tests)) < len(row.tests):
                yield f"{row.id}: names a test twice"


def is_named(name: str, node: str) -> bool:
    """Whether a row's ``name`` means this test; ``node`` is a node id, parameters and all."""
    plain = node.partition("[")[0]
    return plain == name or plain.endswith((f"::{name}", f"/{name}"))


def outcomes(chapters: Iterable[Chapter], tests: Mapping[str, str]) -> dict[str, str]:
    """Clause id -> outcome, of the rows that name tests; ``tests`` is node id -> outcome."""
    by_name: dict[str, list[str]] = {}
    for node in tests:
        by_name.setdefault(node.partition("[")[0].rpartition("::")[2], []).append(node)
    found = {}
    for row in (row for chapter in chapters for row in chapter.rows if row.tests):
        each = []
        for name in row.tests:
            nodes = by_name.get(name.rpartition("::")[2], [])
            cases = [tests[node] for node in nodes if is_named(name, node)]
            # Cases of one test that do not fit this host count only when none of them ran.
            each.append(min(cases, key=OUTCOMES.index, default="not run"))
        found[row.id] = "FAILED" if "FAILED" in each else max(each, key=OUTCOMES.index)
    return found


def render(chapters: Iterable[Chapter], results: Mapping[str, str]) -> str:
    """The document; ``results`` is clause id -> outcome, absent ones did not run."""
    chapters = list(chapters)
    parts = [_HEAD, _summary(chapters, results)]
    for chapter in chapters:
        parts.append(f"\n## {chapter.title}\n")
        for section in chapter.sections:
            parts.append(f"\n### {section.id} {section.title}\n\n")
            if section.note:
                parts.append(f"{section.clauses} clauses, {_FOREIGN}: {section.note}\n")
            else:
                parts.append("| clause | kind | requirement | tests | result |\n|---|---|---|---|---|\n")
                parts.extend(_line(row, results) for row in section.rows)
    return "".join(parts)


def recorded(document: str) -> dict[str, str]:
    """Clause id -> outcome, as a rendered document has them."""
    rows = re.findall(r"^\| ([\d.]+/\d+) \|.*\| \**([\w ]+?)\** \|$", document, re.MULTILINE)
    return {clause: outcome for clause, outcome in rows if outcome in OUTCOMES}


def _verdict(row: Clause, results: Mapping[str, str]) -> str:
    if row.tests:
        return results.get(row.id, "not run")
    return _ABSENT if row.applies else _FOREIGN


def _line(row: Clause, results: Mapping[str, str]) -> str:
    verdict = _verdict(row, results)
    if verdict in ("FAILED", _ABSENT):
        verdict = f"**{verdict}**"
    if row.note:
        verdict = f"{verdict}: {row.note}" if not row.tests else verdict
    tests = "<br>".join(f"`{name}`" for name in row.tests)
    says = f"{row.says} ({row.note})" if row.note and row.tests else row.says
    return f"| {row.id} | {row.kind} | {says} | {tests} | {verdict} |\n"


def _summary(chapters: Iterable[Chapter], results: Mapping[str, str]) -> str:
    lines = [
        "\n| chapter | clauses | covered | passed | failed | not run | not covered | not applicable |\n",
        "|---|--:|--:|--:|--:|--:|--:|--:|\n",
    ]
    total: Counter[str] = Counter()
    for chapter in chapters:
        count = Counter(_verdict(row, results) for row in chapter.rows)
        count["clauses"] = sum(section.clauses for section in chapter.sections)
        count["covered"] = sum(bool(row.tests) for row in chapter.rows)
        count[_FOREIGN] += sum(section.clauses for section in chapter.sections if section.note)
        lines.append(_summary_line(chapter.title, count))
        total += count
    return "".join([*lines, _summary_line("**all**", total)])


def _summary_line(title: str, count: Counter[str]) -> str:
    figures = (
        count["clauses"],
        count["covered"],
        count["passed"],
        count["FAILED"],
        count["skipped"] + count["not run"],
        count[_ABSENT],
        count[_FOREIGN],
    )
    return f"| {title} | {' | '.join(str(figure) for figure in figures)} |\n"
