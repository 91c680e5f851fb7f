"""The locator: every key of a TOML text is found on its own line."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from qvmcore.errors import ConfigError
from qvmcore.toml_source import locate, read_toml

SAMPLE = '''\
# comment with [brackets] and = signs
title = "a # no comment" # comment

[system]
name = 'lit"eral'
doc = """
[not.a.table]
key = 1
ends with a quote""""
raw = \'\'\'
[[nor.this]]
\'\'\'
after.dotted.key = 1

[[vdev]]
type = "a"
list = [ # comment ]
  1, "]", # more
  [2,
   3],
]
inline = { x = 1, y = { z = "}" } }

[[vdev]]
"quoted.key" = 1
'single' = 2
[vdev.sub]
k = 0
[[vdev.deep]]
one = 1
[[vdev.deep]]
two = 2
[ spaced . table ]
v = 1
'''


def test_places_of_a_file_with_everything() -> None:
    tomli.loads(SAMPLE)
    lines = locate(SAMPLE)
    assert lines[("title",)] == 2
    assert lines[("system",)] == 4
    assert lines[("system", "doc")] == 6
    assert lines[("system", "raw")] == 10
    assert lines[("system", "after", "dotted", "key")] == 13
    assert lines[("vdev",)] == lines[("vdev", 0)] == 15
    assert lines[("vdev", 0, "list")] == 17
    assert lines[("vdev", 0, "list", 2, 1)] == 20
    assert lines[("vdev", 0, "inline", "y", "z")] == 22
    assert lines[("vdev", 1)] == 24
    assert lines[("vdev", 1, "quoted.key")] == 25
    assert lines[("vdev", 1, "single")] == 26
    assert lines[("vdev", 1, "sub", "k")] == 28
    assert lines[("vdev", 1, "deep", 1, "two")] == 32
    assert lines[("spaced", "table", "v")] == 34


# -- generated documents: a writer that notes the line of everything it writes -------------------

bare_keys = st.text("abcXYZ019_-", min_size=1, max_size=6)
plain_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)


def _basic(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _multi(text: str) -> str:
    return '"""\n' + text.replace("\\", "\\\\").replace('"', '\\"') + '\n[x]\ny = 1\n"""'


def _multi_literal(text: str) -> str:
    return "'''\n" + text.replace("'", "") + "\n# '' \n'''"


scalars = st.one_of(
    plain_text.map(_basic),
    plain_text.map(_multi),
    plain_text.map(_multi_literal),
    st.integers(-(2**40), 2**40).map(str),
    st.sampled_from(["true", "1.5", "1979-05-27T07:32:00Z", "0xFF", "''"]),
    # Quotes at the end of a multi-line string, escaped quotes, a backslash that is no escape.
    st.sampled_from(['"""x""""', '"""\\"""\n[x]"""', r"'C:\'"]),
)
arrays = st.lists(scalars, max_size=3).map(lambda items: "[ # ]\n" + ",\n\n".join(items) + "\n]")
tables = st.dictionaries(bare_keys, scalars | arrays, max_size=4)
comments = st.sampled_from(["", "# c = [", "\n\n", "#'''", "  \t"])


@given(st.lists(st.tuples(st.sampled_from(["[t]", "[[a]]"]), tables, comments), max_size=6))
def test_every_key_is_found_on_its_line(parts: list[tuple[str, dict[str, str], str]]) -> None:
    lines: list[str] = []
    expected: dict[tuple[str | int, ...], int] = {}
    plain = arrays_seen = 0
    for header, keys, comment in parts:
        lines += comment.split("\n")
        if header == "[t]":
            place: tuple[str | int, ...] = (f"t{plain}",)
            plain += 1
            text = f"[{place[0]}]"
        else:
            place = ("a", arrays_seen)
            arrays_seen += 1
            text = "[[ a ]] # x"
        expected[place] = len(lines) + 1
        lines.append(text)
        for key, value in keys.items():
            expected[(*place, key)] = len(lines) + 1
            lines += f"{key} = {value}".split("\n")
    document = "\n".join(lines)
    tomli.loads(document)
    found = locate(document)
    assert {place: found.get(place) for place in expected} == expected


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = 1\nb = \n", "vm.toml:2: TOML syntax: Invalid value (column 5)"),
        (b"a = 1\na = 2\n", "vm.toml:2: TOML syntax: Cannot overwrite a value (column 6)"),
        (b"a = 1\nb = '\xff'\n", "vm.toml:2: not a TOML file: it is not UTF-8 text"),
        (b"a = " + b"[" * 5000, "vm.toml: TOML syntax: brackets are nested too deeply"),
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_toml(_write(tmp_path / "vm.toml", data), "vm.toml")
    assert str(caught.value) == message


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    source = read_toml(_write(tmp_path / "vm.toml", b"\xef\xbb\xbfa = 1\r\n[t]\r\nb = 2\r\n"), "vm.toml")
    assert source.data == {"a": 1, "t": {"b": 2}}
    assert source.lines[("t", "b")] == 3
