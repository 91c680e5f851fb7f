"""TOML files with line numbers (floor 8).

``tomli`` gives values without places, so :func:`locate` walks over the text once more and notes on
which line every table and key stands. It runs only on a text that tomli has accepted, and
therefore looks for the structure only: strings, brackets, comments.

A place is a path of names and indexes: ``("vdev", 1, "peer")`` is the key ``peer`` of the second
``[[vdev]]``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from qvmcore.errors import ConfigError, Diagnostic

Place = tuple[str | int, ...]

#: A TOML string of any of the four kinds; up to two quotes may stand directly before the closing ones.
_STRING = re.compile(
    r'"{3}(?:[^\\]|\\.)*?"{3,5}'  # """basic"""
    r"|'{3}.*?'{3,5}"  # '''literal'''
    r'|"(?:[^"\\]|\\.)*"'
    r"|'[^']*'",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class TomlSource:
    """A parsed file: ``data`` as tomli gives it, and the 1-based ``lines`` of its places."""

    path: Path
    data: Mapping[str, Any]
    lines: Mapping[Place, int]


def read_toml(path: Path, shown: str) -> TomlSource:
    """Read and parse a file; ``shown`` names it in errors. Raises ConfigError, or OSError."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        return TomlSource(path, tomli.loads(text), locate(text))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _error(shown, line, "not a TOML file: it is not UTF-8 text") from error
    except tomli.TOMLDecodeError as error:
        raise _error(shown, error.lineno, f"TOML syntax: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise _error(shown, 0, "TOML syntax: brackets are nested too deeply") from error


def locate(text: str) -> dict[Place, int]:
    """The 1-based line of every table, key and array element of a valid TOML text.

    A table made by several headers or dotted keys keeps its first line.
    """
    return _Locator(text).run()


def _error(shown: str, line: int, message: str) -> ConfigError:
    return ConfigError([Diagnostic(shown, line, "", message)])


class _Locator:
    """One walk over one text; ``_at`` is the current offset."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [i for i, char in enumerate(text) if char == "\n"]
        self._lines: dict[Place, int] = {}
        #: Number of elements seen of every array of tables.
        self._counts: dict[Place, int] = {}

    def run(self) -> dict[Place, int]:
        table: Place = ()
        while self._skip_blank():
            if self._text.startswith("[[", self._at):
                table = self._array_header()
            elif self._text[self._at] == "[":
                table = self._table_header()
            else:
                self._key_value(table)
        return self._lines

    # -- lines ---------------------------------------------------------------------------------

    def _note(self, place: Place, offset: int) -> None:
        self._lines.setdefault(place, bisect_right(self._newlines, offset - 1) + 1)

    def _note_path(self, base: Place, names: list[str], offset: int) -> Place:
        """Note every table on the way; through an array of tables, the way goes to its last one."""
        place = base
        for name in names:
            place = (*place, name)
            self._note(place, offset)
            if place in self._counts:
                place = (*place, self._counts[place] - 1)
        return place

    # -- structure -----------------------------------------------------------------------------

    def _table_header(self) -> Place:
        offset = self._at
        self._at += 1
        names = self._key()
        self._at += 1
        return self._note_path((), names, offset)

    def _array_header(self) -> Place:
        offset = self._at
        self._at += 2
        names = self._key()
        self._at += 2
        array = (*self._note_path((), names[:-1], offset), names[-1])
        self._note(array, offset)
        count = self._counts.get(array, 0)
        self._counts[array] = count + 1
        table = (*array, count)
        self._note(table, offset)
        return table

    def _key_value(self, table: Place) -> None:
        offset = self._at
        names = self._key()
        place = self._note_path(table, names, offset)
        self._at += 1  # the =
        self._skip_space()
        self._value(place)

    def _value(self, place: Place) -> None:
        char = self._text[self._at]
        if char in "\"'":
            self._string()
        elif char == "[":
            self._array(place)
        elif char == "{":
            self._inline_table(place)
        else:
            while self._at < len(self._text) and self._text[self._at] not in ",]}#\r\n":
                self._at += 1

    def _array(self, place: Place) -> None:
        self._at += 1
        index = 0
        while self._skip_blank() and self._text[self._at] != "]":
            if self._text[self._at] == ",":
                self._at += 1
                continue
            self._note((*place, index), self._at)
            self._value((*place, index))
            index += 1
        self._at += 1

    def _inline_table(self, place: Place) -> None:
        self._at += 1
        while self._skip_blank() and self._text[self._at] != "}":
            if self._text[self._at] == ",":
                self._at += 1
            else:
                self._key_value(place)
        self._at += 1

    # -- words ---------------------------------------------------------------------------------

    def _key(self) -> list[str]:
        """A dotted key; stops at the = or ] behind it."""
        names = []
        while True:
            self._skip_space()
            start = self._at
            if self._text[start] in "\"'":
                self._string()
                # tomli decides what the quoted name is; escapes in keys are too rare to redo.
                names.append(next(iter(tomli.loads(self._text[start : self._at] + " = 0"))))
            else:
                while self._text[self._at] not in ".=] \t":
                    self._at += 1
                names.append(self._text[start : self._at])
            self._skip_space()
            if self._text[self._at] != ".":
                return names
            self._at += 1

    def _string(self) -> None:
        match = _STRING.match(self._text, self._at)
        if match is None:
            raise ValueError(f"no string at offset {self._at}: tomli did not accept this text")
        self._at = match.end()

    def _skip_space(self) -> None:
        while self._at < len(self._text) and self._text[self._at] in " \t":
            self._at += 1

    def _skip_blank(self) -> bool:
        """Skip space, newlines and comments; False at the end of the text."""
        text = self._text
        while self._at < len(text):
            if text[self._at] == "#":
                end = text.find("\n", self._at)
                self._at = len(text) if end < 0 else end
            elif text[self._at] in " \t\r\n":
                self._at += 1
            else:
                return True
        return False
