"""Option types and values in people's words (floor 1): for error messages and for help."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from qvmcore.options.units import Address, Size, format_size
from qvmcore.types import IntrSpec

_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    Size: "a size such as 64K, 16M or 1G",
    Address: "an address such as 0x1c0d0000",
    Path: "a file path",
    IntrSpec: "an interrupt such as 'gic:41'",
    Any: "any value",
    object: "any value",
}


def type_text(hint: Any) -> str:
    """A type in people's words, with its bounds."""
    base, metas = unwrap(hint)
    origin, args = typing.get_origin(base), typing.get_args(base)
    bounds = _bounds_text(metas, base)
    if base in _NAMES:
        return _NAMES[base] + bounds
    if origin is typing.Union or origin is types.UnionType:
        return " or ".join(type_text(arm) for arm in args if arm is not type(None)) + bounds
    if origin is Literal:
        return one_of(spell(arg) for arg in args)
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return one_of(spell(member.value) for member in base)
    if isinstance(base, type) and issubclass(base, msgspec.Struct):
        keys = ", ".join(f.encode_name for f in msgspec.structs.fields(base))
        return f"a table with the keys {keys}"
    if origin is tuple and args and args[-1] is not Ellipsis:
        return "[" + ", ".join(type_text(arg) for arg in args) + "]" + bounds
    if origin in (list, tuple, set, frozenset, Sequence):
        return f"a list of: {type_text(args[0])}{bounds}"
    if origin in (dict, Mapping) and len(args) == 2:
        return f"a table of: {type_text(args[1])}{bounds}"
    return str(getattr(base, "__name__", base)) + bounds


def unwrap(hint: Any) -> tuple[Any, list[msgspec.Meta]]:
    """The type without Annotated, and its msgspec.Meta."""
    metas: list[msgspec.Meta] = []
    while typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        metas += [extra for extra in extras if isinstance(extra, msgspec.Meta)]
    return hint, metas


def _bounds_text(metas: Sequence[msgspec.Meta], base: Any) -> str:
    parts = []
    for meta in metas:
        low, high = meta.ge, meta.le
        if low is not None and high is not None:
            parts.append(f"from {_bound(low, base)} to {_bound(high, base)}")
        elif low is not None:
            parts.append(f"of at least {_bound(low, base)}")
        elif high is not None:
            parts.append(f"of at most {_bound(high, base)}")
        if meta.gt is not None:
            parts.append(f"above {_bound(meta.gt, base)}")
        if meta.lt is not None:
            parts.append(f"below {_bound(meta.lt, base)}")
        if meta.multiple_of is not None:
            parts.append(f"that is a multiple of {_bound(meta.multiple_of, base)}")
        if meta.min_length is not None:
            parts.append(f"of at least {meta.min_length} {_unit(base)}")
        if meta.max_length is not None:
            parts.append(f"of at most {meta.max_length} {_unit(base)}")
        if meta.pattern is not None:
            parts.append(f"that matches {meta.pattern}")
    return "".join(f" {part}" for part in parts)


def _bound(value: float, base: Any) -> str:
    if base is Size and isinstance(value, int):
        return format_size(value)
    return f"{value:#x}" if base is Address and isinstance(value, int) else f"{value}"


def _unit(base: Any) -> str:
    return "characters" if base is str else "entries"


def spell(value: object) -> str:
    """A choice as people write it in a VM file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def one_of(words: typing.Iterable[str]) -> str:
    """``'a', 'b' or 'c'``."""
    quoted = [repr(word) for word in words]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]


def show(value: object) -> str:
    """A value as an error message shows it, never long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def show_default(value: object) -> str:
    """A default as help shows it."""
    if value is None:
        return "none"
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Size):
        return format_size(value)
    if isinstance(value, Address):
        return f"{int(value):#x}"
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show_default(item) for item in value) + "]"
    return str(value)
