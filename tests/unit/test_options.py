"""Options: typed conversion with every problem at once, and their description for help."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from qvmcore.options import (
    Address,
    CommandLineText,
    HostPath,
    Size,
    convert_options,
    describe_options,
    format_size,
    parse_address,
    parse_bool,
    parse_number,
    parse_size,
)
from qvmcore.types import IntrSpec


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct, frozen=True):
    port: Annotated[int, Meta(ge=1, le=65535)] = 80


class Options(msgspec.Struct, frozen=True, rename="kebab"):
    count: Annotated[int, Meta(ge=1, le=8, description="how many")]
    read_only: Annotated[bool, Meta(description="no writes")] = False
    cache: Literal["writeback", "none"] = "writeback"
    colour: Colour = Colour.RED
    limit: Annotated[Size, Meta(ge=512, multiple_of=512)] = Size(4096)
    at: Address | None = None
    image: HostPath | None = None
    line: IntrSpec | None = None
    rate: float = 1.0
    label: Annotated[str, Meta(max_length=4)] = ""
    tags: tuple[str, ...] = ()
    pair: tuple[int, str] | None = None
    inner: Inner = Inner()
    env: dict[str, int] = {}
    either: int | bool = 0

    def __post_init__(self) -> None:
        if self.read_only and self.cache == "none":
            raise ValueError("read-only and cache = 'none' exclude each other")


BASE = Path("/vm")


def convert(**values: Any) -> tuple[Any, list[str]]:
    result, problems = convert_options(Options, {"count": 1} | values, BASE)
    return result, [f"{p.message}; {p.hint}" if p.hint else p.message for p in problems]


def problem(**values: Any) -> str:
    result, problems = convert(**values)
    assert result is None
    assert len(problems) == 1, problems
    return problems[0]


def test_all_kinds_of_values() -> None:
    result, problems = convert(
        count=8, limit="1M", at="0x1c0d0000", image="disk.img", line="gic:41", rate=2, tags=["a", "b"],
        pair=[1, "x"], inner={"port": 22}, env={"a": 1}, colour="blue", either=True,
    )  # fmt: skip
    assert problems == []
    assert (result.count, result.limit, result.at) == (8, 1 << 20, 0x1C0D0000)
    assert isinstance(result.limit, Size)
    assert result.image == Path("/vm/disk.img")
    assert result.line == IntrSpec("gic", 41)
    assert (result.rate, result.tags, result.pair) == (2.0, ("a", "b"), (1, "x"))
    assert (result.inner.port, result.env, result.colour) == (22, {"a": 1}, Colour.BLUE)


def test_dash_and_underscore_are_the_same() -> None:
    assert convert(read_only=True)[0].read_only
    assert convert(**{"read-only": True})[0].read_only
    both = problem(**{"read_only": True, "read-only": True})
    assert both == "key 'read-only' is given twice; it is the same as 'read-only'"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", 0, "count: expected a whole number from 1 to 8, not 0"),
        ("count", "4", "count: expected a whole number from 1 to 8, not '4'"),
        ("count", True, "count: expected a whole number from 1 to 8, not true"),
        ("count", 1.5, "count: expected a whole number from 1 to 8, not 1.5"),
        ("read-only", "yes", "read-only: expected true or false, not 'yes'"),
        ("read-only", 1, "read-only: expected true or false, not 1"),
        ("cache", "writback",
         "cache: expected 'writeback' or 'none', not 'writback'; did you mean 'writeback'?"),
        ("colour", "green", "colour: expected 'red' or 'blue', not 'green'"),
        ("limit", "12 parsecs", "limit: expected a size such as 64K, 16M or 1G, not '12 parsecs'"),
        ("limit", 100, "limit: expected a size such as 64K, 16M or 1G of at least 512 bytes "
                       "that is a multiple of 512 bytes, not 100"),
        ("limit", -1, "limit: expected a size such as 64K, 16M or 1G, not -1: it must be from 0 to 2^64 - 1"),
        ("at", "here", "at: expected an address such as 0x1c0d0000, not 'here'"),
        ("image", 5, "image: expected a file path, not 5"),
        ("image", "", "image: expected a file path, not ''"),
        ("line", "41", "line: expected CONTROLLER:NUMBER such as 'gic:41', not '41'"),
        ("line", 41, "line: expected an interrupt such as 'gic:41', not 41"),
        ("rate", "fast", "rate: expected a number, not 'fast'"),
        ("label", "longer", "label: expected text in quotes of at most 4 characters, not 'longer'"),
        ("label", 5, "label: expected text in quotes of at most 4 characters, not 5"),
        ("tags", "a", "tags: expected a list of: text in quotes, not 'a'"),
        ("tags", ["a", 2], "tags[1]: expected text in quotes, not 2"),
        ("pair", [1], "pair: expected 2 values, not [1]"),
        ("inner", {"prt": 1}, "inner: unknown key 'prt'; did you mean 'port'?"),
        ("inner", 5, "inner: expected a table with the keys port, not 5"),
        ("env", {"a": "x"}, "env.a: expected a whole number, not 'x'"),
        ("either", "x", "either: expected a whole number or true or false, not 'x'"),
    ],
)  # fmt: skip
def test_wrong_values_in_peoples_words(key: str, value: object, message: str) -> None:
    assert problem(**{key: value}) == message


def test_unknown_key_names_the_nearest() -> None:
    assert problem(cuont=2) == "unknown key 'cuont'; did you mean 'count'?"
    assert problem(zzz=2).startswith("unknown key 'zzz'; known keys: count, read-only, ")


def test_missing_key() -> None:
    result, problems = convert_options(Options, {}, BASE)
    assert result is None
    assert [str(p.message) for p in problems] == ["missing key 'count'"]
    assert problems[0].hint == "expected a whole number from 1 to 8"


def test_all_problems_are_reported_at_once() -> None:
    _, problems = convert(count=99, cuont=1, **{"read-only": "no"})
    assert len(problems) == 3


def test_post_init_is_a_problem_of_the_whole_table() -> None:
    result, problems = convert_options(Options, {"count": 1, "read-only": True, "cache": "none"}, BASE)
    assert result is None
    assert [(p.key, p.message) for p in problems] == [("", "read-only and cache = 'none' exclude each other")]


def test_command_line_text_is_converted_as_the_field_asks() -> None:
    text = CommandLineText
    result, problems = convert(
        count=text("0x4"), **{"read-only": text("yes")}, limit=text("1K"), rate=text("0.5"),
        tags=text("a, b"), image=text("/abs"), cache=text("writeback"),
        label=text("12"),
    )  # fmt: skip
    assert problems == []
    assert (result.count, result.read_only, result.limit, result.rate) == (4, True, 1024, 0.5)
    assert (result.tags, result.image, result.label) == (("a", "b"), Path("/abs"), "12")
    assert type(result.label) is str
    assert problem(count=text("four")) == "count: expected a whole number, not 'four'"
    assert problem(**{"read-only": text("maybe")}) == "read-only: expected true or false, not 'maybe'"


def test_base_dir_of_single_keys() -> None:
    values = {"count": 1, "image": "x"}
    result, _ = convert_options(Options, values, BASE, base_dirs={"image": Path("/other")})
    assert result.image == Path("/other/x")


def test_description() -> None:
    rows = {row.name: row for row in describe_options(Options)}
    assert rows["count"].required
    assert rows["count"].type_text == "a whole number from 1 to 8"
    assert rows["count"].help == "how many"
    assert rows["count"].default_text == ""
    assert rows["read-only"].default_text == "false"
    assert rows["cache"].type_text == "'writeback' or 'none'"
    assert rows["limit"].default_text == "4K"
    assert rows["label"].type_text == "text in quotes of at most 4 characters"
    assert rows["colour"].default_text == "'red'"
    assert rows["at"].default_text == "none"


@pytest.mark.parametrize(
    ("text", "value"),
    [("16M", 16 << 20), ("1m", 1 << 20), ("0xa0000", 0xA0000), ("0d16384", 16384), ("0D8K", 8192), ("7", 7),
     ("1G", 1 << 30), ("2T", 2 << 40), (" 5K ", 5120), (12, 12)],
)  # fmt: skip
def test_sizes_as_qnx_writes_them(text: str | int, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "K", "1.5M", "1KB", "0x", "-1", "1 2", "1e3", "\u0966"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"^ram: expected a size such as 64K, 16M or 1G, not"):
        parse_size(text, "ram")


def test_addresses() -> None:
    assert parse_address("mem:0x1c0d0000") == 0x1C0D0000
    with pytest.raises(ValueError, match="expected an address such as 0x1c0d0000, not 'io:0x60'"):
        parse_address("io:0x60")
    with pytest.raises(ValueError, match="from 0 to 2\\^64 - 1"):
        parse_address("0x10000000000000000")


def test_booleans() -> None:
    assert [parse_bool(word) for word in ("on", "YES", "1", "true")] == [True] * 4
    assert [parse_bool(word) for word in ("off", "no", "0", "False")] == [False] * 4
    with pytest.raises(ValueError, match=r"^debug: expected true or false, not '2'$"):
        parse_bool("2", "debug")


@given(st.integers(0, (1 << 64) - 1))
def test_numbers_round_trip(value: int) -> None:
    assert parse_number(hex(value)) == parse_number(str(value)) == parse_number(f"0d{value}") == value
    assert int(parse_size(hex(value))) == int(parse_address(hex(value))) == value


@given(st.integers(0, 1 << 20), st.sampled_from(["K", "M", "G"]))
def test_sizes_round_trip(value: int, suffix: str) -> None:
    size = parse_size(f"{value}{suffix}")
    shown = format_size(size)
    assert "." in shown or shown.endswith("bytes") or parse_size(shown) == size


@given(st.text(max_size=12))
def test_any_text_gives_a_number_or_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_address, parse_bool, parse_number):
        try:
            parse(text)
        except ValueError as error:
            assert "expected" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


option_names = [field.encode_name for field in msgspec.structs.fields(Options)]


@given(st.dictionaries(st.sampled_from(option_names), json_values))
def test_any_value_gives_a_struct_or_problems(values: dict[str, object]) -> None:
    result, problems = convert_options(Options, values, BASE)
    assert (result is None) == bool(problems)


def test_a_path_in_the_home_of_nobody_is_a_problem_not_a_traceback() -> None:
    made, problems = convert_options(Options, {"count": 1, "image": "~nobody-by-this-name/x"}, Path("/vm"))
    assert made is None
    assert problems[0].message == "image: there is no home directory for '~nobody-by-this-name'"
