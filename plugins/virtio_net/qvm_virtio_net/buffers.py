"""Runs of bytes that lie in several pieces."""

from __future__ import annotations

from collections.abc import Sequence


def cut(views: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """The part [start, end) of the bytes that ``views`` are in a row; short when they end before."""
    part: list[memoryview] = []
    for view in views:
        size = len(view)
        if start < size:
            part.append(view[start:end] if start or end < size else view)
        start = max(0, start - size)
        end -= size
        if end <= 0:
            break
    return part


def fill(views: Sequence[memoryview], data: bytes | bytearray | memoryview) -> int:
    """Copy ``data`` into ``views`` from their start on; the count copied, short when they are full."""
    source = memoryview(data)
    done = 0
    for view in views:
        size = min(len(view), len(source) - done)
        if not size:
            continue
        view[:size] = source[done : done + size]
        done += size
    return done
