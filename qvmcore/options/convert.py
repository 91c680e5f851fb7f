"""From a table of a VM file to a typed options struct, field by field (floor 1).

A value is converted by the type of its field; the type is walked recursively, so that a problem
names its place inside a list or table.
"""

from __future__ import annotations

import enum
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from qvmcore.errors import nearest
from qvmcore.options.fields import CommandLineText, host_path
from qvmcore.options.units import (
    Address,
    Size,
    parse_address,
    parse_bool,
    parse_number,
    parse_size,
)
from qvmcore.options.words import one_of, show, show_default, spell, type_text, unwrap
from qvmcore.types import IntrSpec


@dataclass(frozen=True, slots=True)
class OptionProblem:
    """One thing wrong with an option. ``key`` is as the user wrote it; empty for the whole table."""

    key: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """What a person needs to know about one option. ``default_text`` is empty when required."""

    name: str
    type_text: str
    default_text: str
    required: bool
    help: str


class _BadValueError(Exception):
    """A value does not fit; ``path`` is the place inside the value, e.g. ``[2]`` or ``.port``."""

    def __init__(self, message: str, hint: str = "", path: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.path = message, hint, path


def convert_options(
    cls: type[msgspec.Struct],
    values: Mapping[str, object],
    base_dir: Path,
    *,
    base_dirs: Mapping[str, Path] | None = None,
) -> tuple[Any, list[OptionProblem]]:
    """The struct, or None with every problem found.

    ``base_dirs`` gives the base directory of single keys whose value came from another file.
    ``ValueError`` of ``__post_init__`` is a problem of the whole table (its key is empty).
    """
    fields = {_canonical(f.encode_name): f for f in msgspec.structs.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    problems: list[OptionProblem] = []
    converted: dict[str, object] = {}
    for key, value in values.items():
        field = fields.get(_canonical(key))
        if field is None:
            problems.append(_unknown_key(key, [f.encode_name for f in fields.values()]))
        elif field.name in converted:
            hint = f"it is the same as {field.encode_name!r}"
            problems.append(OptionProblem(key, f"key {key!r} is given twice", hint))
        else:
            converter = _Converter((base_dirs or {}).get(key, base_dir))
            converted[field.name] = None
            try:
                converted[field.name] = converter.convert(hints.get(field.name, field.type), value)
            except _BadValueError as bad:
                problems.append(OptionProblem(key, f"{key}{bad.path}: {bad.message}", bad.hint))
    for field in fields.values():
        if field.required and field.name not in converted:
            what = type_text(hints.get(field.name, field.type))
            problems.append(OptionProblem("", f"missing key {field.encode_name!r}", f"expected {what}"))
    if problems:
        return None, problems
    try:
        return cls(**converted), []
    except ValueError as error:
        return None, [OptionProblem("", str(error))]


def describe_options(cls: type[msgspec.Struct]) -> list[OptionInfo]:
    """The options of a struct in the order they are declared."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = []
    for field in msgspec.structs.fields(cls):
        hint = hints.get(field.name, field.type)
        default: object = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        text = "" if field.required else show_default(default)
        rows.append(OptionInfo(field.encode_name, type_text(hint), text, field.required, _help(hint)))
    return rows


class _Converter:
    """Converts one value; holds what conversion depends on besides the type."""

    def __init__(self, base_dir: Path) -> None:
        self._base_dir = base_dir

    def convert(self, hint: Any, value: object) -> object:
        """The typed value. Raises _BadValueError."""
        base, metas = unwrap(hint)
        result = self._convert_base(base, value, type_text(hint))
        for meta in metas:
            _check_bounds(meta, result, value, type_text(hint))
        return result

    def _convert_base(self, base: Any, value: object, expected: str) -> object:
        origin, args = typing.get_origin(base), typing.get_args(base)
        lax = isinstance(value, CommandLineText)
        if base is Any or base is object:
            return str(value) if isinstance(value, CommandLineText) else value
        if origin is typing.Union or origin is types.UnionType:
            return self._convert_union(args, value, expected)
        if origin is Literal:
            return _convert_choice({spell(arg): arg for arg in args}, value)
        if isinstance(base, type) and issubclass(base, enum.Enum):
            return _convert_choice({spell(member.value): member for member in base}, value)
        if isinstance(base, type) and issubclass(base, msgspec.Struct):
            return self._convert_struct(base, value, expected)
        if origin in (list, tuple, set, frozenset, Sequence) or base in (list, tuple, set, frozenset):
            return self._convert_sequence(origin or base, args, value, expected)
        if origin in (dict, Mapping) and len(args) == 2:
            if not isinstance(value, Mapping):
                raise _mismatch(expected, value)
            return {str(key): self._inside(f".{key}", args[1], item) for key, item in value.items()}
        scalar = _SCALARS.get(base)
        if scalar is not None:
            try:
                return scalar(value, lax, self._base_dir)
            except TypeError:
                raise _mismatch(expected, value) from None
            except ValueError as error:
                raise _BadValueError(str(error)) from None
        try:
            return msgspec.convert(value, base, strict=not lax)
        except (msgspec.ValidationError, TypeError) as error:
            raise _BadValueError(f"expected {expected}, not {show(value)} ({error})") from None

    def _convert_union(self, args: tuple[Any, ...], value: object, expected: str) -> object:
        arms = [arm for arm in args if arm is not type(None)]
        if value is None and len(arms) < len(args):
            return None
        failures = []
        for arm in arms:
            try:
                return self.convert(arm, value)
            except _BadValueError as bad:
                failures.append(bad)
        # With one real arm (X | None) its own words are the most precise ones.
        raise failures[0] if len(failures) == 1 else _mismatch(expected, value)

    def _convert_struct(self, cls: type[msgspec.Struct], value: object, expected: str) -> object:
        if not isinstance(value, Mapping):
            raise _mismatch(expected, value)
        result, problems = convert_options(cls, value, self._base_dir)
        if problems:
            raise _BadValueError("; ".join(str(p.message) for p in problems), problems[0].hint)
        return result

    def _convert_sequence(self, kind: Any, args: tuple[Any, ...], value: object, expected: str) -> object:
        if isinstance(value, CommandLineText):
            value = [CommandLineText(part.strip()) for part in value.split(",")] if value else []
        if not isinstance(value, list):
            raise _mismatch(expected, value)
        if kind is tuple and args and args[-1] is not Ellipsis:
            if len(args) != len(value):
                raise _mismatch(f"{len(args)} values", value)
            return tuple(self._inside(f"[{i}]", args[i], item) for i, item in enumerate(value))
        item_hint = args[0] if args else Any
        items = [self._inside(f"[{i}]", item_hint, item) for i, item in enumerate(value)]
        return items if kind in (list, Sequence) else kind(items)

    def _inside(self, place: str, hint: Any, value: object) -> object:
        try:
            return self.convert(hint, value)
        except _BadValueError as bad:
            raise _BadValueError(bad.message, bad.hint, place + bad.path) from None


def _scalar_bool(value: object, lax: bool, base_dir: Path) -> object:
    if lax:
        return parse_bool(str(value))
    if not isinstance(value, bool):
        raise TypeError
    return value


def _scalar_int(value: object, lax: bool, base_dir: Path) -> object:
    if lax:
        text = str(value)
        return -parse_number(text[1:]) if text.startswith("-") else parse_number(text)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _scalar_float(value: object, lax: bool, base_dir: Path) -> object:
    if lax:
        try:
            return float(str(value))
        except ValueError:
            raise TypeError from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _number_or_text(value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return value if isinstance(value, int) else str(value)


_SCALARS: Mapping[Any, Any] = {
    bool: _scalar_bool,
    int: _scalar_int,
    float: _scalar_float,
    str: lambda value, lax, base_dir: _text(value),
    Size: lambda value, lax, base_dir: parse_size(_number_or_text(value)),
    Address: lambda value, lax, base_dir: parse_address(_number_or_text(value)),
    Path: lambda value, lax, base_dir: host_path(_text(value), base_dir),
    IntrSpec: lambda value, lax, base_dir: IntrSpec.parse(_text(value)),
}


def _help(hint: Any) -> str:
    return next((meta.description for meta in unwrap(hint)[1] if meta.description), "")


def _check_bounds(meta: msgspec.Meta, result: Any, value: object, expected: str) -> None:
    number = result if isinstance(result, int | float) and not isinstance(result, bool) else None
    length = len(result) if hasattr(result, "__len__") else None
    bad = (
        (meta.ge is not None and number is not None and number < meta.ge)
        or (meta.le is not None and number is not None and number > meta.le)
        or (meta.gt is not None and number is not None and number <= meta.gt)
        or (meta.lt is not None and number is not None and number >= meta.lt)
        or (meta.multiple_of is not None and number is not None and number % meta.multiple_of != 0)
        or (meta.min_length is not None and length is not None and length < meta.min_length)
        or (meta.max_length is not None and length is not None and length > meta.max_length)
        or (meta.pattern is not None and isinstance(result, str) and not re.search(meta.pattern, result))
    )
    if bad:
        raise _mismatch(expected, value)


def _convert_choice(choices: Mapping[str, object], value: object) -> object:
    spelt = spell(value) if not isinstance(value, CommandLineText) else str(value)
    if spelt in choices:
        return choices[spelt]
    raise _BadValueError(f"expected {one_of(choices)}, not {show(value)}", nearest(spelt, choices))


def _mismatch(expected: str, value: object) -> _BadValueError:
    return _BadValueError(f"expected {expected}, not {show(value)}")


def _unknown_key(key: str, known: Sequence[str]) -> OptionProblem:
    hint = nearest(key, known)
    if not hint:
        hint = "known keys: " + ", ".join(known) if known else "there are no options here"
    return OptionProblem(key, f"unknown key {key!r}", hint)


def _canonical(key: str) -> str:
    return key.replace("-", "_")
