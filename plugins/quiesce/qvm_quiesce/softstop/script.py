"""A soft stop written in the VM file: writes and waits on the registers of a device nobody knows here.

Each entry of ``script`` is a table::

    { bar = 0, offset = 0x14, write = 0x0 }                             write a register
    { bar = 0, offset = 0x1c, mask = 0x1, equals = 0x0, within = 0.5 }  wait until register & mask == equals
    { bar = 0, offset = 0x14, mask = 0x1, write = 0x0 }                 change only the bits of the mask

``size`` is 1, 2, 4 (default) or 8 bytes, ``within`` seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from qvm_quiesce.softstop.registers import read, write
from qvm_quiesce.subject import Policy, Steps, Subject

KEYS = frozenset({"bar", "offset", "size", "write", "mask", "equals", "within"})


def problem(entry: Mapping[str, Any]) -> str:
    """What is wrong with an entry; empty when nothing is."""
    unknown = sorted(set(entry) - KEYS)
    if unknown:
        return f"unknown key {unknown[0]!r}; known keys: {', '.join(sorted(KEYS))}"
    for key, value in entry.items():
        # TOML has booleans, and Python counts them as numbers.
        kinds: tuple[type, ...] = (int, float) if key == "within" else (int,)
        if type(value) not in kinds:
            return f"{key}: expected a number, not {value!r}"
    if "offset" not in entry or ("write" in entry) == ("equals" in entry):
        return "expected offset and either write or equals"
    if entry.get("size", 4) not in (1, 2, 4, 8):
        return f"size is 1, 2, 4 or 8, not {entry['size']}"
    limit = 1 << 8 * entry.get("size", 4)
    for key in ("write", "mask", "equals"):
        if not 0 <= entry.get(key, 0) < limit:
            return f"{key}: {entry[key]:#x} does not fit {entry.get('size', 4)} bytes"
    if not 0 <= entry.get("bar", 0) <= 5 or not 0 <= entry["offset"] < 1 << 64:
        return "bar is 0 to 5, offset not negative"
    return "" if 0 < entry.get("within", 1) <= 60 else "within is more than 0 and at most 60 seconds"


def proves(policy: Policy) -> bool:
    """Whether its end shows something: a script that only writes does not know what became of it."""
    return policy.soft_stop in ("auto", "script") and any("equals" in entry for entry in policy.script)


def stop(subject: Subject) -> Steps:
    """Run the script of the policy."""
    for entry in subject.policy.script:
        bar, at, size = entry.get("bar", 0), entry["offset"], entry.get("size", 4)
        full = (1 << 8 * size) - 1
        mask = entry.get("mask", full)
        if "write" in entry:
            value = entry["write"] & mask
            if mask != full:
                value |= read(subject, bar, _name(bar, at), at, size) & ~mask
            write(subject, bar, _name(bar, at), at, value, size)
        else:
            holds = partial(_holds, subject, bar, at, size, mask, entry["equals"])
            yield from subject.wait_until(holds, entry.get("within", subject.policy.soft_stop_deadline))


def _holds(subject: Subject, bar: int, at: int, size: int, mask: int, wanted: int) -> bool:
    return read(subject, bar, _name(bar, at), at, size) & mask == wanted


def _name(bar: int, at: int) -> str:
    return f"bar{bar}+{at:#x}"
