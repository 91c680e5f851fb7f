"""hostdev strings and the escape key: pure parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_chardev import CharSpec, Kind, parse_spec
from qvm_chardev.escape import Command, EscapeFilter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stdio", CharSpec(Kind.STDIO)),
        (" terminal ", CharSpec(Kind.TERMINAL)),
        ("null", CharSpec(Kind.NULL)),
        ("pty", CharSpec(Kind.PTY)),
        ("pty:con", CharSpec(Kind.PTY, "con")),
        ("unix:/run/x", CharSpec(Kind.UNIX, "/run/x")),
        ("file:log", CharSpec(Kind.FILE, "log", reads=False)),
        (">log", CharSpec(Kind.FILE, "log", reads=False)),
        ("> log", CharSpec(Kind.FILE, "log", reads=False)),
        (">>log", CharSpec(Kind.FILE, "log", reads=False, append=True)),
        ("<in", CharSpec(Kind.FILE, "in", writes=False)),
        (">-", CharSpec(Kind.STDIO, reads=False)),
        ("<-", CharSpec(Kind.STDIO, writes=False)),
        (">|tee x", CharSpec(Kind.COMMAND, "tee x", reads=False)),
        ("/dev/ttyS0", CharSpec(Kind.FILE, "/dev/ttyS0")),
    ],
)
def test_each_form_means_what_the_readme_says(text: str, expected: CharSpec) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize("text", ["", "  ", "<", "> ", ">>", ">|", "unix:", "pty:", "file: ", "a\0b"])
def test_a_malformed_hostdev_is_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="hostdev"):
        parse_spec(text)


@settings(deadline=None)
@given(st.text())
def test_any_text_parses_or_is_a_value_error(text: str) -> None:
    try:
        spec = parse_spec(text)
    except ValueError:
        return
    assert spec.reads or spec.writes


@pytest.mark.parametrize("form", ["{}", "<{}", ">{}", "unix:{}", "pty:{}"])
def test_the_home_of_nobody_is_told(form: str) -> None:
    with pytest.raises(ValueError, match="no home directory for '~nobody-by-this-name'"):
        parse_spec(form.format("~nobody-by-this-name/x"))


def test_escape_commands() -> None:
    assert EscapeFilter().feed(b"a\x01xb\x01pc\x01h\x01?") == (
        b"abc", [Command.QUIT, Command.POWER_BUTTON, Command.HELP, Command.HELP],
    )  # fmt: skip


def test_escape_twice_sends_one_and_an_unknown_key_is_eaten() -> None:
    assert EscapeFilter().feed(b"\x01\x01\x01zq") == (b"\x01q", [])


@settings(deadline=None)
@given(st.binary(), st.data())
def test_escape_does_not_depend_on_how_input_is_cut(data: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(0, len(data)))
    whole, parts = EscapeFilter(), EscapeFilter()
    plain, commands = whole.feed(data)
    first, second = parts.feed(data[:cut]), parts.feed(data[cut:])
    assert (plain, commands) == (first[0] + second[0], first[1] + second[1])
